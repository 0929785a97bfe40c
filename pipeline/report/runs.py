"""What each run did and when, from the records of runs and of commits."""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate

import numpy as np

from pipeline.ledger import Ledger
from schemas.ledger import CommitRecord
from schemas.report import Cost, RunFigures, RunRecord, Throughput
from schemas.rows import Status

_MOST_BINS = 60
_STARTED = re.compile(r"(\d{8}T\d{6})Z-")


class Timeline:
    """Commits by run and second: bounded by the time that runs took, not by their units."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._tokens: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._prompt: Counter[str] = Counter()
        self._output: Counter[str] = Counter()
        self._commits = 0

    def add(self, record: CommitRecord) -> None:
        for work in record.history():
            second = _second(work.at)
            self._commits += 1
            self._rows[work.run][second] += work.rows
            self._tokens[work.run][second] += work.prompt_tokens + work.output_tokens
            self._prompt[work.run] += work.prompt_tokens
            self._output[work.run] += work.output_tokens

    def runs(self, records: dict[str, RunRecord]) -> list[RunFigures]:
        """Every run that did some rows, the first one first."""
        did = self._rows.keys() | {run for run, record in records.items() if record.rows}
        return sorted((self._figures(run, records.get(run)) for run in did), key=_start)

    def _figures(self, run: str, record: RunRecord | None) -> RunFigures:
        seconds = sorted(self._rows.get(run, ()))
        if match := _STARTED.match(run):
            seconds = [_second(match[1] + "+00:00"), *seconds]
        figures = RunFigures(
            run=run,
            started_at=datetime.fromtimestamp(min(seconds), UTC).isoformat(),
            seconds=max(1.0, float(max(seconds) - min(seconds))),
            rows=self._rows[run].total(),
            prompt_tokens=self._prompt[run],
            output_tokens=self._output[run],
        )
        return _recorded(figures, record) if record else figures

    def throughput(self, runs: list[RunFigures]) -> Throughput:
        if not runs:
            return Throughput()
        seconds = sum(run.seconds for run in runs)
        bins = max(1, min(_MOST_BINS, self._commits // 2, int(seconds)))
        edges = np.linspace(0.0, seconds, bins + 1)
        rows, tokens = np.zeros(bins), np.zeros(bins)
        ends = list(accumulate(run.seconds for run in runs))
        for run, end in zip(runs, ends, strict=True):
            rows += _per_bin(edges, run, end, self._rows[run.run])
            tokens += _per_bin(edges, run, end, self._tokens[run.run])
        return Throughput(
            bin_seconds=seconds / bins,
            rows=tuple(rows.round(2).tolist()),
            tokens=tuple(tokens.round(2).tolist()),
            run_ends=tuple(ends[:-1]),
        )


def _recorded(figures: RunFigures, record: RunRecord) -> RunFigures:
    """The same with what the run itself told."""
    figures = replace(
        figures,
        seconds=round(record.seconds, 1),
        stage_seconds=record.stage_seconds,
        hardware=record.hardware,
        what=record.what,
        failed=record.rows.get(Status.FAILED, 0),
        tiles=record.tiles,
        start_seconds=round(record.start_seconds, 1),
        foretold=record.foretold,
        rank_busy=tuple(round(share, 4) for share in record.rank_busy),
        restarts=record.restarts,
        copied_tokens=record.copied_tokens,
    )
    if record.what == "run":
        return figures
    # Rows that came out no better were done too, but their units have no trace of it.
    return replace(
        figures,
        rows=sum(record.rows.values()),
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.output_tokens,
    )


def run_records(ledger: Ledger) -> tuple[dict[str, RunRecord], list[str]]:
    """The records of runs, by run, and a line for each that cannot be read."""
    records, problems = {}, []
    for name in ledger.runs():
        try:
            records[name] = ledger.run(name)
        except Exception as error:  # a record more or less must not cost the report
            problems.append(f"the record of run {name} cannot be read: {error}")
    return records, problems


def cost(runs: list[RunFigures], gpu_hour_price: float | None) -> Cost | None:
    """None without a price, and where no run is known to have used a GPU."""
    on_gpus = [run for run in runs if run.hardware and run.hardware.gpus]
    if gpu_hour_price is None or not on_gpus:
        return None
    hours = sum(run.seconds * run.hardware.gpus for run in on_gpus if run.hardware) / 3600
    rows = sum(run.rows for run in on_gpus)
    total = hours * gpu_hour_price
    return Cost(gpu_hour_price, hours, total, total / rows * 1e6 if rows else None)


def _per_bin(edges: np.ndarray, run: RunFigures, end: float, counts: Counter[int]) -> np.ndarray:
    """What a run did in each bin. A unit is spread over the time since the commit before it: one
    unit more or less in a bin would look like work going up and down."""
    start = _second(run.started_at)
    begin = end - run.seconds
    seconds = sorted(counts)
    times = [begin, *(min(begin + second + 1 - start, end) for second in seconds)]
    done = [0, *accumulate(counts[second] for second in seconds)]
    return np.diff(np.interp(edges, times, done))


def _start(run: RunFigures) -> tuple[str, str]:
    return run.started_at, run.run


def _second(iso: str) -> int:
    return int(datetime.fromisoformat(iso).timestamp())
