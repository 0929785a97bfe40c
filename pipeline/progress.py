"""What a run shows while it works: a live line in a terminal, a plain one now and then elsewhere.

Counts what it is given; knows neither Ray nor the ledger.
"""

import re
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

QUIET_SECONDS = 30.0  # between two lines where there is no terminal, unless there is news
_MOST_ENDINGS = 8  # that are told
_LOOK_SECONDS = 0.2  # for news
_SHARE = re.compile(r"\d+%")


class Progress:
    """Use as a context. One thread sets the numbers and the phase; another shows them."""

    def __init__(self, console: Console | None = None) -> None:
        self.phase = "listing the source"  # shown until the first rows come
        self.waiting: str | None = None  # for what
        self._stopping: str | None = None
        self.pending_units = 0
        self.rows = 0
        self.failed = 0
        self.tokens = 0
        self.committed_units = 0
        self._started = time.monotonic()
        self._first_rows: float | None = None
        self._console = console or Console(stderr=True)
        self._live: Live | None = None  # in a terminal
        self._lines: threading.Thread | None = None  # elsewhere
        self._printing = threading.Lock()
        self._told = ""
        self._printed = 0.0
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if is_live(self._console):
            self._live = Live(get_renderable=self.line, console=self._console, refresh_per_second=2)
            self._live.start(refresh=True)
        else:
            self._lines = threading.Thread(target=self._print_lines, daemon=True)
            self._lines.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self.waiting = None  # it was looked at some seconds ago
        if self._live is not None:
            self._live.stop()
        elif self.has_results():
            self._console.print(self.line(), soft_wrap=True)

    def start(self, pending_units: int, phase: str) -> None:
        self.pending_units, self.phase = pending_units, phase
        # At once: starting Ray keeps all threads waiting for some seconds.
        if self._live is not None:
            self._live.refresh()
        elif self._lines is not None:
            self._print_line()

    def note(self, message: str) -> None:
        """A line that stays, above the live one."""
        self._console.print(message, soft_wrap=True, markup=False, highlight=False)

    def stopping(self, seconds: float) -> None:
        """Somebody asked the run to stop, and it finishes what it has begun; 0: nothing, but it
        takes Ray some seconds to end. Made for a handler of signals: prints nothing itself."""
        within = f" within {seconds:g} s (asked again: at once)" if seconds else ""
        self._stopping = f"stopping{within}"

    def generated(self, rows: int, failed: int, tokens: int) -> None:
        """Rows came back from the replicas; tokens counts prompts and answers."""
        if self._first_rows is None:
            self._first_rows = time.monotonic()
        self.rows += rows
        self.failed += failed
        self.tokens += tokens

    def committed(self, units: int) -> None:
        self.committed_units += units

    def has_results(self) -> bool:
        """Whether a last line tells a log more than the phase that it was told already."""
        return self._first_rows is not None

    def line(self) -> Text:
        """What counts most comes first: a terminal of 80 columns cuts the rest."""
        seconds = time.monotonic() - self._started
        parts = [f"[{clock(seconds)}]"]
        if self._first_rows is None:
            units = f" ({count(self.pending_units, 'unit')} to do)" if self.pending_units else ""
            parts.append(self._doing() + units)
        else:
            if self._stopping or self.waiting:
                parts.append(self._doing())
            parts += [
                count(self.rows, "row"),
                f"{self.failed:,} failed",
                f"units {self.committed_units:,}/{self.pending_units:,}",
                self._time_left(),
                f"{self.rows / seconds:,.1f} rows/s",
                f"{self.tokens / seconds:,.0f} tokens/s",
            ]
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")

    def _doing(self) -> str:
        return self._stopping or self.waiting or self.phase

    def _time_left(self) -> str:
        """From the pace since the first rows: loading the model happens only once."""
        if not self.committed_units or self._first_rows is None:
            return "time left unknown until a unit is done"
        pace = (time.monotonic() - self._first_rows) / self.committed_units
        return f"about {clock(pace * (self.pending_units - self.committed_units))} left"

    def _print_lines(self) -> None:
        self._print_line()
        while not self._done.wait(min(_LOOK_SECONDS, QUIET_SECONDS)):
            self._print_line()

    def _print_line(self) -> None:
        """Where there is no terminal: at each change of what the run does, and now and then."""
        with self._printing:
            due = time.monotonic() >= self._printed + QUIET_SECONDS
            doing = _SHARE.sub("", self._doing())  # a larger one is no news
            if self._told != doing or due:
                self._told, self._printed = doing, time.monotonic()
                self._console.print(self.line(), soft_wrap=True)


def is_live(console: Console) -> bool:
    """Whether a line can be drawn over and over. Rich takes a log file for a terminal where
    FORCE_COLOR is set, as in many a CI, and draws nothing before the end in a dumb one."""
    return console.is_interactive and console.file.isatty()


def count(number: int, what: str) -> str:
    """1 row, 2,000 rows."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def endings(unread: Mapping[str, int]) -> str:
    """The counts of files that are not read, for a user: the most frequent first."""
    by_count = sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{number:,} {what}" for what, number in by_count[:_MOST_ENDINGS]]
    rest = sum(number for _, number in by_count[_MOST_ENDINGS:])
    return ", ".join(told) + (f", {rest:,} with other endings" if rest else "")


def clock(seconds: float) -> str:
    """12:34, or 5:12:34 when it is longer than an hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
