"""What a run tells at its end, and what a report tells of a whole dataset."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from schemas.errors import LedgerError
from schemas.ledger import Growth

RunKind = Literal["run", "retry"]


@dataclass(frozen=True)
class Summary:
    """The rows that this run committed, and how the dataset stands after it.

    stage_seconds: busy seconds of each stage, summed over its workers; read, prepare and commit
    overlap with generate, so they add up to more than `seconds`, which is the clock on the wall.
    loaded_seconds: of them, a replica's time from when it had loaded the model to its last row; the
    mean of the replicas. 0 where that is not known.
    rank_busy: the share of that time in which each rank of a replica computed, and the most it
    could; empty where that is not known.
    restarts: how often a replica that ended was started again.
    prompt_tokens, output_tokens: of all rows; copied_tokens: those among them of copied rows, which
    no replica computed.
    """

    output: str
    units: int  # all that were planned, committed by this run and the ones before it
    rows: dict[str, int] = field(default_factory=dict)  # by status
    reasons: dict[str, int] = field(default_factory=dict)
    copied: int = 0  # rows that were answered as an identical image had been
    prompt_tokens: int = 0
    output_tokens: int = 0
    copied_tokens: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    loaded_seconds: float = 0.0
    rank_busy: tuple[float, ...] = ()
    rank_busy_at_most: tuple[float, ...] = ()
    restarts: int = 0
    growth: Growth | None = None  # what the plan grew by, where the job says so
    failed_in_all: int | None = None  # failed rows of every run; counted for a strict job only
    random_weights: bool = False


@dataclass(frozen=True)
class Hardware:
    """What a run worked on. A replica is a whole model, a rank one GPU (or process) of it."""

    device: str
    ranks: int
    replicas: int
    prepare_workers: int
    gpu: str | None = None  # its kind, where the cluster knows it

    @property
    def gpus(self) -> int:
        return self.ranks * self.replicas if self.device == "cuda" else 0


@dataclass(frozen=True)
class Foretold:
    """What a plan made right before a run said of it. failed: rows without a usable image.

    seconds: None where no speed was known; speed: where it came from. exact: every header was
    read. looked: some were; else rows are taken to be like those of an earlier run, and if there is
    none all but their number is 0. rank_busy: the most that each rank of a replica can be, see
    RankEstimate. pages: there are documents, as files or within any.
    """

    rows: int
    failed: int
    tiles: int
    prompt_tokens: int
    exact: bool
    seconds: float | None = None
    gpu_hours: float | None = None
    speed: str | None = None
    rank_busy: tuple[float, ...] = ()
    pages: bool = False
    looked: bool = True

    @property
    def knows_rows(self) -> bool:
        """More than how many they are."""
        return self.looked or self.prompt_tokens > 0

    @property
    def mean_prompt_tokens(self) -> float:
        """Of the rows with a usable image; 0 without any."""
        return self.prompt_tokens / max(1, self.rows - self.failed)


@dataclass(frozen=True)
class RunRecord:
    """_vl01/runs/<run>.json: what one run did, also one that was stopped before its end.

    start_seconds: until the first rows came: Ray's start, the model's loading.
    loaded_seconds, rank_busy, restarts, copied_tokens: as in Summary.
    changed: keys of the dataset's job that were others for the rows of this run, a retry.
    rows: those it did, by what came out; a retry may have left an older answer in their place. A
    run that was killed leaves no record; the commit records still tell what it committed and when.
    """

    run: str
    started_at: str
    finished_at: str
    seconds: float
    rows: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    stage_seconds: dict[str, float]
    hardware: Hardware | None = None
    what: RunKind = "run"
    tiles: int = 0
    foretold: Foretold | None = None
    start_seconds: float = 0.0
    loaded_seconds: float = 0.0
    rank_busy: tuple[float, ...] = ()
    restarts: int = 0
    changed: dict[str, float] = field(default_factory=dict)
    copied_tokens: int = 0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "RunRecord":
        """Raises LedgerError, naming `where`, for a damaged record or one of another version."""
        try:
            values = json.loads(data)
            if values["hardware"] is not None:
                values["hardware"] = Hardware(**values["hardware"])
            if values.get("foretold") is not None:
                values["foretold"] = Foretold(**_with_tuple(values["foretold"]))
            return cls(**_with_tuple(values))
        except (ValueError, TypeError, KeyError) as error:
            raise LedgerError(f"{where} is not the record of a run: {error}") from error


def _with_tuple(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only, and older records no such key."""
    return values | {"rank_busy": tuple(values.get("rank_busy", ()))}


@dataclass(frozen=True)
class Distribution:
    """Of one column, over the rows that have a value; all None or empty where none has.

    edges: of the histogram's bins, one more than counts. above: values beyond the last edge, which
    leaves out a long tail (the highest hundredth).
    """

    count: int
    mean: float | None = None
    least: float | None = None
    median: float | None = None
    p95: float | None = None
    most: float | None = None
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    above: int = 0


@dataclass(frozen=True)
class RunFigures:
    """One run as the report tells it. hardware and stage_seconds: empty of a run that was killed.

    seconds: on the wall, loading the model included; to its last commit if it was killed.
    failed, tiles, start_seconds, foretold, rank_busy, restarts, copied_tokens: of runs that left a
    record.
    """

    run: str
    started_at: str
    seconds: float
    rows: int
    prompt_tokens: int
    output_tokens: int
    stage_seconds: dict[str, float] = field(default_factory=dict)
    hardware: Hardware | None = None
    what: RunKind = "run"
    failed: int = 0
    tiles: int = 0
    start_seconds: float = 0.0
    foretold: Foretold | None = None
    rank_busy: tuple[float, ...] = ()
    restarts: int = 0
    copied_tokens: int = 0


@dataclass(frozen=True)
class Throughput:
    """Rows and tokens (read and written) in bins of the time that runs worked. A unit counts evenly
    over the time since the commit before it, hence the fractions.

    Time between runs is left out; run_ends: where, in seconds, one run ended and the next began.
    """

    bin_seconds: float = 0.0
    rows: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    run_ends: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Measured over the runs whose hardware is known; loading the model is part of it."""

    gpu_hour_price: float
    gpu_hours: float
    total: float
    per_million_rows: float | None


@dataclass(frozen=True)
class Sampled:
    """A row of the contact sheet. why: "random", or the risk that it was chosen for."""

    row_id: str
    why: str
    source: str
    member: str | None
    page: int | None
    status: str


@dataclass(frozen=True)
class Report:
    """_vl01/report.json. units_outdated: committed, but with files that changed since and are to be
    done again. rows_planned: of the units that could be counted before reading them.
    rows_per_second: of all rows that runs did, also those they did again. tokens_per_second: of
    the tokens that were computed, so without those of copied rows.
    """

    output: str
    made_at: str
    units_planned: int
    units_committed: int
    units_outdated: int
    rows_planned: int
    rows: int
    statuses: dict[str, int]
    reasons: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    seconds: float
    rows_per_second: float | None
    tokens_per_second: float | None
    stage_seconds: dict[str, float]
    distributions: dict[str, Distribution]
    throughput: Throughput
    runs: tuple[RunFigures, ...]
    cost: Cost | None
    sampled: tuple[Sampled, ...]
    problems: tuple[str, ...]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()
