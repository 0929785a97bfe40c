"""Counts what a run does, for the progress line and for the summary at its end."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from types import MappingProxyType

import pyarrow as pa

from pipeline.commit import Committer
from pipeline.ledger import Ledger, now
from pipeline.metrics import RunMetrics
from pipeline.progress import Progress
from schemas.errors import EngineError, StoppedError
from schemas.ledger import Growth, Work
from schemas.report import Foretold, Hardware, RunKind, RunRecord, Summary

FAILURES_COUNT_AFTER = 200  # rows: fewer say little about the rest
_TIMED_BY_ROW = ("read", "prepare", "generate")


class Tally:
    """One run's counts: what left the replicas, and what was committed of it."""

    def __init__(
        self,
        progress: Progress,
        what: RunKind = "run",
        changed: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """changed: keys of the dataset's job that are others in this run."""
        self._progress = progress
        self._what: RunKind = what
        self._changed = changed
        self.growth: Growth | None = None  # what the plan grew by, if it was to
        self.foretold: Foretold | None = None
        self.hardware: Hardware | None = None  # known once Ray has started
        self.metrics: RunMetrics | None = None  # likewise
        self._started_at = now()
        self._started = time.monotonic()
        self._start_seconds = 0.0  # until the first rows came
        self._rows: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()  # by reason, of the rows that were generated
        self._stage_seconds: dict[str, float] = dict.fromkeys((*_TIMED_BY_ROW, "commit"), 0.0)
        self._replica_seconds = 0.0  # of all replicas, from when each had loaded the model
        self._rank_seconds: tuple[float, ...] = ()  # of them, that the ranks of each place computed
        self._restarts = 0  # of replicas
        self._copied = 0  # rows, from identical images
        self._copied_tokens = 0  # of those rows: nothing was computed for them
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._tiles = 0

    def generated(self, rows: pa.Table) -> None:
        """Rows in the GENERATED schema, as they leave the replicas."""
        self._start_seconds = self._start_seconds or time.monotonic() - self._started
        for stage in _TIMED_BY_ROW:
            self._stage_seconds[stage] += sum(_known(rows[f"{stage}_seconds"]))
        self._replica_seconds += sum(_known(rows["replica_seconds"]))
        for seconds in _known(rows["rank_seconds"]):
            both = zip_longest(self._rank_seconds, seconds, fillvalue=0.0)
            self._rank_seconds = tuple(before + more for before, more in both)
        copied = rows.filter(rows["copied"])
        self._copied += copied.num_rows
        self._copied_tokens += _tokens(copied)
        failed = rows.filter(rows["text"].is_null())
        self._failures.update(failed["reason"].to_pylist())
        self._progress.generated(
            rows=rows.num_rows,
            failed=failed.num_rows,
            tokens=_tokens(rows) - _tokens(copied),
        )

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Times what is done inside as the commit stage."""
        started = time.monotonic()
        yield
        self._stage_seconds["commit"] += time.monotonic() - started

    def committed(self, works: Iterable[Work], begun: int) -> None:
        """begun: units that are computed in part."""
        for work in works:
            if self.metrics:
                self.metrics.committed(work)
            self._rows.update(work.statuses)
            self._reasons.update(work.reasons)
            self._prompt_tokens += work.prompt_tokens
            self._output_tokens += work.output_tokens
            self._tiles += work.tiles
            self._progress.committed(1)
        if self.metrics:
            left = self._progress.pending_units - self._progress.committed_units
            self.metrics.units(left, begun)

    def noted(self, messages: Iterable[str]) -> None:
        """Tells the user at once of what is no failure of the run."""
        for message in messages:
            self._progress.note(message)

    def replicas(self, news: Iterable[str], restarts: int) -> None:
        """Tells what became of replicas. restarts: of them, since the run began."""
        self.noted(news)
        self._restarts = restarts

    def waits(self, what: str | None) -> None:
        """Tells what the run waits for, until it is called again."""
        if self._progress.waiting and not what:  # else it would seem to start Ray once more
            self._progress.phase = "waiting for the first answers"
        self._progress.waiting = what

    def check_failures(self, most: float) -> None:
        """Raises StoppedError when a larger share than `most` of this run's rows failed."""
        rows, failed = self._progress.rows, self._progress.failed
        if rows < FAILURES_COUNT_AFTER or failed <= most * rows:
            return
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self._failures.most_common(3))
        raise StoppedError(
            f"{failed:,} of the first {rows:,} rows failed, more than --max-failure-rate {most:g}"
            f" allows: {reasons}. What is committed stays; the same command does what is left, with"
            " a higher --max-failure-rate if so many failures are expected."
        )

    def check_stopped(self, signal_name: str | None) -> None:
        """Raises StoppedError when a signal ended the run before all was done."""
        done, asked = self._progress.committed_units, self._progress.pending_units
        if signal_name and done < asked:
            raise StoppedError(
                f"stopped by {signal_name}: {done:,} of the {asked:,} units of this run are"
                " committed; the same command does the rest"
            )

    @contextmanager
    def recorded(self, ledger: Ledger, run: str) -> Iterator[None]:
        """Leaves the record of a run, also of one that stops early. One that cannot be written
        costs the report some figures: the commit records hold what counts."""
        try:
            yield
        finally:
            with suppress(Exception):
                ledger.write_run(self._record(run))

    def _record(self, run: str) -> RunRecord:
        return RunRecord(
            run=run,
            what=self._what,
            started_at=self._started_at,
            finished_at=now(),
            seconds=time.monotonic() - self._started,
            rows=dict(self._rows),
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            copied_tokens=self._copied_tokens,
            stage_seconds=self._stage_seconds,
            hardware=self.hardware,
            tiles=self._tiles,
            start_seconds=self._start_seconds,
            foretold=self.foretold,
            loaded_seconds=self._loaded_seconds(),
            rank_busy=self._rank_busy(),
            restarts=self._restarts,
            changed=dict(self._changed),
        )

    def _loaded_seconds(self) -> float:
        return self._replica_seconds / (self.hardware.replicas if self.hardware else 1)

    def _rank_busy(self) -> tuple[float, ...]:
        """The share of the time in which each rank computed, over all replicas."""
        whole = self._replica_seconds
        return tuple(seconds / whole for seconds in self._rank_seconds) if whole else ()

    def summary(self, ledger: Ledger, committer: Committer, strict: bool) -> Summary:
        """Raises EngineError when units are left: rows of them went missing on the way."""
        planned = ledger.totals.units
        if left := planned - int(ledger.committed().sum()) + len(ledger.outdated()):
            raise EngineError(
                f"{left:,} of {planned:,} units are not done, {len(committer.incomplete()):,} of"
                " them in part. What is committed stays; the same command does the rest."
            )
        return Summary(
            output=ledger.output,
            units=planned,
            rows=dict(self._rows),
            reasons=dict(self._reasons),
            copied=self._copied,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            copied_tokens=self._copied_tokens,
            seconds=time.monotonic() - self._started,
            stage_seconds=self._stage_seconds,
            loaded_seconds=self._loaded_seconds(),
            rank_busy=self._rank_busy(),
            rank_busy_at_most=self.foretold.rank_busy if self.foretold else (),
            restarts=self._restarts,
            growth=self.growth,
            failed_in_all=ledger.failed_rows() if strict else None,
            random_weights=ledger.job["job"]["random_weights"],
        )


def _tokens(rows: pa.Table) -> int:
    """Of prompts and answers."""
    return sum(_known(rows["prompt_tokens"])) + sum(_known(rows["output_tokens"]))


def _known(column: pa.ChunkedArray) -> list:
    return column.drop_null().to_pylist()
