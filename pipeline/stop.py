"""How a run ends early on request: SIGTERM (a spot notice) or Ctrl-C, with time to tidy up.

Knows signals and clocks; what is worth finishing is told by the caller.
"""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Any, TypeVar

from schemas.errors import StoppedError

T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)


class Stop:
    """A context that listens for the signals, in the main thread (elsewhere it hears none).

    The first one ends `relay` after a while, or the run at once if it is not that far yet; a
    second one raises KeyboardInterrupt wherever the run is. `asked` names the first.
    """

    def __init__(
        self, grace_seconds: float, asked: Callable[[float], None] = lambda _: None
    ) -> None:
        """asked: told the seconds of grace by the handler of the first signal; 0 when there is
        nothing to finish."""
        self.asked: str | None = None
        self._grace_seconds = grace_seconds
        self._told = asked
        self._deadline = float("inf")
        self._waiting = False
        self._unfinished: Callable[[], Collection[int]] | None = None  # while there is work
        self._begun: set[int] = set()  # of it, when asked to stop
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        self.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises StoppedError in the place of what a signal has raised inside."""
        if self.asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, _EnoughError):
            raise StoppedError(
                f"stopped by {self.asked}; the same command does what is left"
            ) from None

    def listen(self) -> None:
        """To be called again after `ray.init`, which puts its own handler in place."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.signal(number, self._on_signal)
                self._before.setdefault(number, before)

    def relay(self, tables: Iterator[T], unfinished: Callable[[], Collection[int]]) -> Iterator[T]:
        """`tables` as they come. Once asked to stop, only until all that `unfinished` names at
        that moment is finished, and no longer than the time of grace."""
        self._unfinished = unfinished
        try:
            while (table := self._next(tables)) is not None:
                yield table
        except _EnoughError:
            return
        finally:
            self._unfinished = None

    def _next(self, tables: Iterator[T]) -> T | None:
        self._waiting = True  # before the check: a signal right after it must not be missed
        try:
            self._check_enough()
            return next(tables, None)
        finally:
            self._waiting = False

    def _check_enough(self) -> None:
        if self.asked and self._unfinished:
            over = time.monotonic() >= self._deadline
            if over or not self._begun.intersection(self._unfinished()):
                raise _EnoughError

    def _on_signal(self, number: int, _: object) -> None:
        if number != signal.SIGALRM:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = signal.Signals(number).name
            self._begun = set(self._unfinished()) if self._unfinished else set()
            grace = self._grace_seconds if self._begun else 0.0
            self._told(grace)
            if self._unfinished is None:
                raise _EnoughError
            self._deadline = time.monotonic() + grace
            signal.setitimer(signal.ITIMER_REAL, max(0.001, grace))
        if self._waiting:  # never in the middle of a commit
            self._check_enough()


class _EnoughError(BaseException):
    """Ends the wait for a table, or whatever a run does before and after; no `except Exception` on
    the way may swallow it, or take it for an error of the storage."""
