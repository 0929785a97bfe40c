"""Fixed images whose answers must stay what they were: how a replica that computes wrong is found.

A replica answers them when it starts and every hour, between the rows of the run, and compares with
the first answers that this dataset knows of the same kind of device. In bfloat16 the rows beside
them round them otherwise: what is wrong among rows is asked again alone before it counts.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from model.engine.engine import Engine
from model.inputs.prompt import PromptTemplate
from model.inputs.tiling import Pinpoints, choose_layout
from schemas.requests import Request, Result, Sampling

logger = logging.getLogger(__name__)

HOUR = 3600.0

_SIZES = ((160, 120), (300, 700))  # of the images, in pixels: a wide one and a tall one
_IDS = tuple(f"canary-{number}" for number in range(len(_SIZES)))
_TOKENS = 12

# Largest difference of a token's log-probability, in nats, that is taken for rounding. In float32
# the arithmetic of a row does not depend on its batch at all; in bfloat16 it does.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


Answers = list[dict[str, Any]]  # CanaryAnswer as JSON holds it


@dataclass(frozen=True)
class CanarySettings:
    """Picklable. kind: answers of one kind are comparable, such as those of bfloat16 on an H100."""

    template: PromptTemplate
    pinpoints: Pinpoints
    tile: int
    patch: int
    dtype: str
    kind: str


@dataclass(frozen=True)
class CanaryAnswer:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each of them


class WrongAnswerError(Exception):
    """A replica computes what it did not compute before: memory, a link or an update is broken."""


class Book(Protocol):
    """Where the first answers of each kind are kept, for all replicas of this run and of others."""

    def reference(self, kind: str, answers: Answers) -> Answers:
        """The answers that the book holds of this kind: these, if it held none."""
        ...


class Canary:
    """The canaries of one replica: `requests` when they are `due`, `take` for every result."""

    def __init__(self, settings: CanarySettings, book: Book) -> None:
        self._settings = settings
        self._book = book
        self._asked_at: float | None = None
        self._answers: dict[str, CanaryAnswer] = {}
        self.doubted = False  # wrong among rows: to be checked when the engine has nothing else

    @property
    def due(self) -> bool:
        return self._asked_at is None or time.monotonic() - self._asked_at >= HOUR

    def requests(self) -> list[Request]:
        """To be given to the engine now; the same ones each time."""
        self._asked_at = time.monotonic()
        self._answers = {}
        return [self._request(number) for number in range(len(_SIZES))]

    def check(self, engine: Engine) -> None:
        """Asks an engine that has nothing else to do. Raises WrongAnswerError when the answers are
        not those of the book."""
        self.doubted = False
        for result in engine.generate(self.requests()):
            self._note(result)

    def take(self, result: Result) -> bool:
        """Whether a result that came among those of rows is one of ours; it may be `doubted`."""
        if result.id not in _IDS:
            return False
        try:
            self._note(result)
        except WrongAnswerError as error:
            logger.warning("%s; it is asked once more, alone", error)
            self.doubted = True
        return True

    def _note(self, result: Result) -> None:
        self._answers[result.id] = CanaryAnswer(result.token_ids, result.token_logprobs)
        if len(self._answers) == len(_IDS):
            self._compare([self._answers[name] for name in _IDS])

    def _compare(self, answers: list[CanaryAnswer]) -> None:
        written = [asdict(answer) for answer in answers]
        known = [
            CanaryAnswer(tuple(answer["token_ids"]), tuple(answer["logprobs"]))
            for answer in self._book.reference(self._settings.kind, written)
        ]
        tolerance = _TOLERANCE[self._settings.dtype]
        worst = max(map(difference, answers, known))
        if worst > tolerance:
            raise WrongAnswerError(
                f"a replica answers a fixed image otherwise than before on {self._settings.kind}: a"
                f" token's log-probability differs by {worst:.3g}; expected at most {tolerance:g}."
                " If an update made it so, remove _vl01/canary.json from the output"
            )

    def _request(self, number: int) -> Request:
        settings, (width, height) = self._settings, _SIZES[number]
        layout = choose_layout(width, height, settings.pinpoints, settings.tile, settings.patch)
        return Request(
            id=_IDS[number],
            token_ids=settings.template.fill(layout.tokens),
            tiles=picture(layout.tiles, settings.tile),
            image_size=(width, height),
            sampling=Sampling(max_new_tokens=_TOKENS),
        )


def picture(tiles: int, side: int) -> np.ndarray:
    """uint8 [tiles, side, side, 3]: bands, edges and texture, made of integers alone, so that no
    version of an image library changes a pixel."""
    n, y, x, c = np.ogrid[:tiles, :side, :side, :3]
    bands = (x * (3 + c) + y * 2 + n * 37) % 256
    edges = 255 * (((x // 24) + (y // 18) * (c + 1) + n) % 3 == 0)
    return np.where((x // 96 + y // 84) % 2, bands, edges).astype(np.uint8)


def difference(one: CanaryAnswer, other: CanaryAnswer) -> float:
    """Largest difference of log-probabilities, up to and with the first token that differs.

    There each has taken its own likeliest token: near enough in probability, rounding has decided
    between two that are as good as equal. What follows are different texts.
    """
    if not one.logprobs or not other.logprobs:
        return 0.0 if one.logprobs == other.logprobs else math.inf
    same = _common(one.token_ids, other.token_ids)
    gaps = [
        abs(a - b)
        for a, b in zip(one.logprobs[: same + 1], other.logprobs[: same + 1], strict=False)
    ]
    return math.inf if any(map(math.isnan, gaps)) else max(gaps)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that are the same in both."""
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))
