"""The generations of one row: the first, and those that a ladder adds while the answer is poor.

Pure decisions: what to ask next, and which answer is best. Knows neither engine nor threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from model.inputs.turning import Turner
from schemas.errors import RowError
from schemas.ladder import CAUSES, Cause, Step, is_empty, merit
from schemas.requests import Request, Result

# Columns of an answer, its `reason` among them when something is wrong with it.
Judge = Callable[[Result], Mapping[str, Any]]


@dataclass(frozen=True)
class Climb:
    """How a row may be tried again: in which steps, with how many generations after the first."""

    ladder: Sequence[Step] = ()
    retries: int | None = None  # None: as many as there are steps
    turner: Turner | None = None  # None: no step turns the page


@dataclass(frozen=True)
class Attempt:
    """A generation that was answered. turn: clockwise, in degrees, of the page as it came."""

    request: Request
    turn: int
    result: Result
    columns: Mapping[str, Any]

    @property
    def empty(self) -> bool:
        return is_empty(self.columns.get("reason"), self.result.text)

    def causes(self, step: Step) -> set[Cause]:
        cause = CAUSES.get(self.columns.get("reason"))
        found = {cause} if cause else set()
        if self.empty:
            found.add(Cause.EMPTY)
        if self.result.mean_logprob < step.unsure_below:
            found.add(Cause.UNSURE)
        return found

    def beats(self, other: "Attempt") -> bool:
        """Of one turn of the page, the answer that ended better, or as well and surer. Of two turns
        the surer one, however it ended: nonsense ends by itself too. A text beats an empty answer
        only if it is surer, for a page may be without text; nothing is empty enough to beat a text.
        """
        if self.empty and not other.empty:
            return False
        if self.turn == other.turn and not other.empty and self._merit != other._merit:
            return self._merit > other._merit
        return self.result.mean_logprob > other.result.mean_logprob

    @property
    def _merit(self) -> tuple[int, int]:
        return merit(self.columns.get("reason"), self.request.sampling.max_new_tokens)


@dataclass
class Attempts:
    """Of one row. To be given each answer in turn, for it to say what to ask next.

    first: the request as the row came. seed: of the attempt with this number (1 is the first).
    """

    first: Request
    judge: Judge
    seed: Callable[[int], int]
    climb: Climb = field(default_factory=Climb)
    best: Attempt | None = None
    count: int = 0  # generations

    def __post_init__(self) -> None:
        self._asked, self._turn = self.first, 0
        self._error: RowError | None = None
        self._requests = islice(self._climbed(), self.climb.retries)

    def next(self, result: Result) -> Request | None:
        """What to ask after this answer; None when the best is good, or all was tried."""
        self.count += 1
        attempt = Attempt(self._asked, self._turn, result, self.judge(result))
        if self.best is None or attempt.beats(self.best):
            self.best = attempt
        return next(self._requests, None)

    def refused(self, error: RowError) -> Request | None:
        """What to ask after a request that the engine can never compute."""
        self._error = error
        return next(self._requests, None) if self.best else None

    def columns(self) -> Mapping[str, Any]:
        """Of the best answer; or why there is none."""
        known = {"row_id": self.first.id, "attempts": self.count}
        if self.best is None:
            assert self._error is not None
            return known | {"reason": self._error.reason, "message": self._error.message}
        return {**self.best.columns, **known, **self._turned(self.best)}

    def _turned(self, best: Attempt) -> Mapping[str, Any]:
        if not (best.turn and self.climb.turner and best.request.image_size):
            return {}
        width, height = best.request.image_size
        layout = self.climb.turner.layout(width, height)
        notes = f"turned {best.turn} degrees clockwise", best.columns.get("message")
        return {
            "message": "; ".join(filter(None, notes)),
            "width": width,
            "height": height,
            "tiles": layout.tiles,
            "image_tokens": layout.tokens,
        }

    def _climbed(self) -> Iterator[Request]:
        for number, step in enumerate(self.climb.ladder, 2):
            assert self.best is not None
            if self.best.causes(step).intersection(step.when):
                yield self._change(self.best, step, number)

    def _change(self, best: Attempt, step: Step, number: int) -> Request:
        request, self._turn = best.request, best.turn
        if step.turn and self.climb.turner:
            request, self._turn = self.climb.turner.turn(self.first, step.turn), step.turn
        before = best.request.sampling
        sampling = replace(
            before,
            temperature=before.temperature if step.temperature is None else step.temperature,
            max_new_tokens=max(1, round(before.max_new_tokens * step.more_tokens)),
            seed=self.seed(number),
        )
        self._asked = replace(request, id=f"{self.first.id}#{number}", sampling=sampling)
        return self._asked
