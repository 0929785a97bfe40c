"""What a run tells at its end."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Summary:
    """The rows that this run committed, and how the dataset stands after it.

    stage_seconds: busy seconds of each stage, summed over its workers; read, prepare and commit
    overlap with generate, so they add up to more than `seconds`, which is the clock on the wall.
    """

    output: str
    units: int  # all that were planned, committed by this run and the ones before it
    rows: dict[str, int] = field(default_factory=dict)  # by status
    reasons: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    failed_in_all: int | None = None  # failed rows of every run; counted for a strict job only
