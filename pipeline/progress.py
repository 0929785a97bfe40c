"""What a run shows while it works: a live line in a terminal, a plain one now and then elsewhere.

Counts what it is given; knows neither Ray nor the ledger.
"""

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

QUIET_SECONDS = 30.0  # between two lines where there is no terminal


class Progress:
    """Use as a context; call `generated` and `committed` from one thread."""

    def __init__(
        self,
        pending_units: int,
        console: Console | None = None,
        phase: str = "starting Ray, loading the model",
    ) -> None:
        self.pending_units = pending_units
        self.rows: Counter[str] = Counter()  # generated, by status
        self.tokens = 0
        self.committed_units = 0
        self.phase = phase  # shown until the first rows come
        self._started = time.monotonic()
        self._first_rows: float | None = None
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self.line, console=self._console, refresh_per_second=2)
            self._live.start()
        else:
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._live is not None:
            self._live.stop()
        else:
            self._console.print(self.line())

    def generated(self, statuses: dict[str, int], tokens: int) -> None:
        """Rows came back from the replicas; tokens counts prompt and output."""
        if self._first_rows is None:
            self._first_rows = time.monotonic()
        self.rows.update(statuses)
        self.tokens += tokens

    def committed(self, units: int) -> None:
        self.committed_units += units

    def line(self) -> Text:
        seconds = time.monotonic() - self._started
        parts = [f"[{clock(seconds)}]"]
        if self._first_rows is None:
            parts.append(f"{self.phase} ({self.pending_units:,} units to do)")
        else:
            rows = self.rows.total()
            parts += [
                f"{rows:,} rows",
                f"{rows / seconds:,.1f} rows/s",
                f"{self.tokens / seconds:,.0f} tokens/s",
                f"{self.rows['failed']:,} failed",
                f"units {self.committed_units:,}/{self.pending_units:,}",
                self._time_left(),
            ]
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")

    def _time_left(self) -> str:
        """From the pace since the first rows: loading the model happens only once."""
        if not self.committed_units or self._first_rows is None:
            return "time left unknown until a unit is done"
        pace = (time.monotonic() - self._first_rows) / self.committed_units
        return f"about {clock(pace * (self.pending_units - self.committed_units))} left"

    def _print_lines(self) -> None:
        self._console.print(self.line())
        while not self._done.wait(QUIET_SECONDS):
            self._console.print(self.line())


def clock(seconds: float) -> str:
    """12:34, or 5:12:34 when it is longer than an hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
