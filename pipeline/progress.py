"""What a run shows while it works: a live line in a terminal, a plain one now and then elsewhere.

Counts what it is given; knows neither Ray nor the ledger.
"""

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

QUIET_SECONDS = 30.0  # between two lines where there is no terminal


class Progress:
    """Use as a context. One thread sets the numbers and the phase; another shows them."""

    def __init__(self, console: Console | None = None) -> None:
        self.phase = "listing the source"  # shown until the first rows come
        self.waiting: str | None = None  # for what
        self.pending_units = 0
        self.rows = 0
        self.failed = 0
        self.tokens = 0
        self.committed_units = 0
        self._started = time.monotonic()
        self._first_rows: float | None = None
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._done = threading.Event()

    def __enter__(self) -> Self:
        # Rich takes a log file for a terminal where FORCE_COLOR is set, as in many a CI, and draws
        # nothing before the end in a dumb one.
        if self._console.is_interactive and self._console.file.isatty():
            self._live = Live(get_renderable=self.line, console=self._console, refresh_per_second=2)
            self._live.start(refresh=True)
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
            self._console.print(self.line(), soft_wrap=True)

    def start(self, pending_units: int, phase: str) -> None:
        self.pending_units, self.phase = pending_units, phase
        if self._live is not None:
            self._live.refresh()  # at once: starting Ray keeps the terminal for some seconds

    def note(self, message: str) -> None:
        """A line that stays, above the live one."""
        self._console.print(message, soft_wrap=True, markup=False, highlight=False)

    def generated(self, rows: int, failed: int, tokens: int) -> None:
        """Rows came back from the replicas; tokens counts prompts and answers."""
        if self._first_rows is None:
            self._first_rows = time.monotonic()
        self.rows += rows
        self.failed += failed
        self.tokens += tokens

    def committed(self, units: int) -> None:
        self.committed_units += units

    def line(self) -> Text:
        seconds = time.monotonic() - self._started
        parts = [f"[{clock(seconds)}]"]
        waiting = self.waiting
        if self._first_rows is None:
            units = f" ({self.pending_units:,} units to do)" if self.pending_units else ""
            parts.append((waiting or self.phase) + units)
        else:
            parts += [
                f"{self.rows:,} rows",
                f"{self.rows / seconds:,.1f} rows/s",
                f"{self.tokens / seconds:,.0f} tokens/s",
                f"{self.failed:,} failed",
                f"units {self.committed_units:,}/{self.pending_units:,}",
                self._time_left(),
            ]
            if waiting:
                parts.insert(1, waiting)
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")

    def _time_left(self) -> str:
        """From the pace since the first rows: loading the model happens only once."""
        if not self.committed_units or self._first_rows is None:
            return "time left unknown until a unit is done"
        pace = (time.monotonic() - self._first_rows) / self.committed_units
        return f"about {clock(pace * (self.pending_units - self.committed_units))} left"

    def _print_lines(self) -> None:
        self._console.print(self.line(), soft_wrap=True)
        while not self._done.wait(QUIET_SECONDS):
            self._console.print(self.line(), soft_wrap=True)


def clock(seconds: float) -> str:
    """12:34, or 5:12:34 when it is longer than an hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
