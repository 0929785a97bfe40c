"""What goes into the engine and what comes out of it. Plain data: numpy, no torch."""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np


class FinishReason(StrEnum):
    STOP = "stop"  # the end-of-text token or a stop string
    LENGTH = "length"  # max_new_tokens were written
    REPETITION = "repetition"  # the answer went round in circles; the text keeps the first round
    CONSTRAINT = "constraint"  # the grammar of json_schema grew past its limits: cut there


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 is greedy; top_p 1 keeps the whole vocabulary. `stop` strings end the text and
    are not part of it. The draw for a token depends on `seed` and the token's position alone.
    `json_schema`: JSON text of the schema that the answer must follow, as JSON without whitespace.
    `stop_repetition` ends an answer that has gone round in circles for longer than a page could.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    stop_repetition: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not self.temperature >= 0:  # nor is NaN
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if "" in self.stop:
            raise ValueError("an empty stop string ends every text at once; expected characters")


@dataclass(frozen=True)
class Request:
    """One prompt, ready to compute.

    token_ids: int32 [T]; the image token stands once for every feature of the image.
    tiles: uint8 [N, tile, tile, 3] RGB, the thumbnail first; None for a prompt without an image.
    image_size: (width, height) in pixels of the image that was tiled; None without one.
    """

    id: str
    token_ids: np.ndarray
    tiles: np.ndarray | None = None
    image_size: tuple[int, int] | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Result:
    """The answer to a request.

    token_ids: every written token, also the end-of-text token and those of a stop string.
    token_logprobs: of each of them, at temperature 1 and over the whole vocabulary: what the model
        itself gave it, also where a schema left it no choice. mean_logprob: their mean.
    token_ends: the length of the text in characters once that token is written. Within a character
        that takes several tokens it grows with the first of them.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    mean_logprob: float
    token_logprobs: tuple[float, ...]
    token_ends: tuple[int, ...]
