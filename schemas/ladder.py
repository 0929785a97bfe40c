"""What a poor answer is, and what is tried again then: a ladder of steps, as a job carries it.

Knows what may be changed; `pipeline/attempts.py` climbs it.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import Reason


class Cause(StrEnum):
    """What is poor about an answer."""

    REPETITION = "repetition"  # it went round in circles
    MAX_NEW_TOKENS = "max_new_tokens"  # it was cut at its length limit
    INVALID = "invalid"  # it breaks the schema
    UNSURE = "unsure"  # its mean log-probability is below `unsure_below`
    EMPTY = "empty"  # it has neither a letter nor a digit, though the page is not blank


CAUSES: Mapping[str | None, Cause] = {
    Reason.REPETITION: Cause.REPETITION,
    Reason.MAX_NEW_TOKENS: Cause.MAX_NEW_TOKENS,
    Reason.INVALID_JSON: Cause.INVALID,
    Reason.SCHEMA_MISMATCH: Cause.INVALID,
}  # by the reason that an answer has
_FROM_WORST = (Cause.REPETITION, Cause.MAX_NEW_TOKENS, Cause.INVALID, None)


def merit(reason: str | None, limit: int) -> tuple[int, int]:
    """How well an answer ended, to compare it with another of the same image: more is better.

    One that ended by itself counts more than any that was cut. Of two that were cut at their limit
    of tokens, the one with the higher limit is worth more.
    """
    cause = CAUSES.get(reason)
    return _FROM_WORST.index(cause), limit if cause is Cause.MAX_NEW_TOKENS else 0


def is_empty(reason: str | None, text: str) -> bool:
    """Whether an answer that ended by itself has neither a letter nor a digit: it never takes the
    place of a text."""
    return reason is None and not any(map(str.isalnum, text))


class Step(BaseModel):
    """One more generation, when the best answer so far has one of the causes in `when`.

    It repeats the generation of that best answer, but for what is given here. more_tokens is a
    factor on its longest answer; turn is clockwise, in degrees, from the page as it came.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    when: Annotated[tuple[Cause, ...], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0)] | None = None
    more_tokens: Annotated[float, Field(gt=0, le=16)] = 1.0
    turn: Literal[90, 180, 270] | None = None
    unsure_below: Annotated[float, Field(le=0)] = -1.0
