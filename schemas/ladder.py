"""What is tried again when an answer is poor: a ladder of steps, as a job carries it.

Knows what may be changed; `pipeline/attempts.py` climbs it.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Cause(StrEnum):
    """What is poor about an answer."""

    REPETITION = "repetition"  # it went round in circles
    MAX_NEW_TOKENS = "max_new_tokens"  # it was cut at its length limit
    INVALID = "invalid"  # it breaks the schema
    UNSURE = "unsure"  # its mean log-probability is below `unsure_below`
    EMPTY = "empty"  # it has neither a letter nor a digit, though the page is not blank


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
