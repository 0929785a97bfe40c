"""The numbers of a report, from the commit records and a few columns of the parts.

Parts are streamed: memory holds a few batches of rows, and counts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ledger import Ledger, now
from pipeline.report.distribution import ValueCounts
from pipeline.report.runs import Timeline, cost, run_records
from pipeline.report.sample import Columns, Pick, Sample
from pipeline.storage import PatientFile
from schemas.ledger import CommitRecord
from schemas.report import Distribution, Report

_THREADS = 8
_BATCH_ROWS = 32_768  # 16 MB of texts of 500 characters
_MOST_PROBLEMS = 20
_LOGPROB_STEP = 0.001
_NUMBERS = ("prompt_tokens", "image_tokens", "output_tokens", "tiles", "attempts", "mean_logprob")
_COLUMNS = ["status", "text", *_NUMBERS]
_DISTRIBUTIONS = ("prompt_tokens", "output_tokens", "tiles", "text_length", "mean_logprob")


@dataclass(frozen=True)
class Collected:
    """The report but for its contact sheet, and the rows that go on it."""

    report: Report
    picks: list[Pick]


@dataclass(frozen=True)
class _Scanned:
    """One committed unit: its record, and its rows' columns as far as they could be read."""

    record: CommitRecord | None
    batches: list[dict[str, np.ndarray]]
    problem: str | None = None


def collect(ledger: Ledger, gpu_hour_price: float | None = None, seed: int = 0) -> Collected:
    """Reads the ledger, which `resume` has opened. A damaged part is a line in `problems`."""
    records, problems = run_records(ledger)
    timeline, sample = Timeline(), Sample(seed)
    values = {name: ValueCounts() for name in _DISTRIBUTIONS}
    values["mean_logprob"] = ValueCounts(_LOGPROB_STEP)
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    committed = np.flatnonzero(ledger.committed()).tolist()
    for unit, scanned in zip(committed, _scan_all(ledger, committed), strict=True):
        if scanned.problem:
            problems.append(f"unit {unit}: {scanned.problem}")
        if scanned.record:
            timeline.add(scanned.record)
            statuses.update(scanned.record.statuses)
            reasons.update(scanned.record.reasons)
        first = 0
        for batch in scanned.batches:
            for name in _DISTRIBUTIONS:
                values[name].add(batch[name])
            sample.add(_columns(unit, first, batch))
            first += len(batch["status"])
    runs = timeline.runs(records)
    seconds = sum(run.seconds for run in runs)
    rows = sum(statuses.values())
    prompt_tokens = sum(run.prompt_tokens for run in runs)
    output_tokens = sum(run.output_tokens for run in runs)
    computed = prompt_tokens + output_tokens - sum(run.copied_tokens for run in runs)
    report = Report(
        output=ledger.output,
        made_at=now(),
        units_planned=ledger.totals.units,
        units_committed=len(committed),
        units_outdated=len(ledger.outdated()),
        rows_planned=ledger.totals.rows,
        rows=rows,
        statuses=dict(statuses),
        reasons=dict(reasons),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seconds=seconds,
        rows_per_second=sum(run.rows for run in runs) / seconds if seconds else None,
        tokens_per_second=computed / seconds if seconds else None,
        stage_seconds=dict(sum((Counter(run.stage_seconds) for run in runs), Counter())),
        distributions=_distributions(values),
        throughput=timeline.throughput(runs),
        runs=tuple(runs),
        cost=cost(runs, gpu_hour_price),
        sampled=(),
        problems=_short(problems),
    )
    return Collected(report, sample.picks())


def _scan_all(ledger: Ledger, units: list[int]) -> Iterator[_Scanned]:
    """In the order of the units; a few are read ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = iter(units)
        for some in iter(lambda: list(islice(waiting, 4 * _THREADS)), []):
            yield from pool.map(lambda unit: _scan(ledger, unit), some)


def _scan(ledger: Ledger, unit: int) -> _Scanned:
    record = None
    batches = []
    try:
        record = ledger.record(unit)
        with PatientFile(ledger.fs, ledger.part_path(unit), cache_type="none") as file:
            source: Any = file
            parquet = pq.ParquetFile(source)
            batches += map(
                _numbers, parquet.iter_batches(_BATCH_ROWS, columns=_COLUMNS, use_threads=False)
            )
    except Exception as error:  # missing, cut, unreadable: of many classes
        return _Scanned(record, batches, " ".join(str(error).split()))
    return _Scanned(record, batches)


def _numbers(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """The columns as numpy arrays of float64, null as NaN; texts as their length."""
    lengths = pc.call_function("utf8_length", [batch.column("text")])
    numbers = {name: batch.column(name) for name in _NUMBERS} | {"text_length": lengths}
    return {
        "status": np.asarray(batch.column("status").to_numpy(zero_copy_only=False), "U16"),
        **{name: _floats(column) for name, column in numbers.items()},
    }


def _floats(column: pa.Array) -> np.ndarray:
    return column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)


def _columns(unit: int, first: int, batch: dict[str, np.ndarray]) -> Columns:
    return Columns(
        unit=unit,
        first=first,
        status=batch["status"],
        attempts=batch["attempts"],
        length=batch["text_length"],
        mean_logprob=batch["mean_logprob"],
    )


def _distributions(values: dict[str, ValueCounts]) -> dict[str, Distribution]:
    return {name: counts.distribution() for name, counts in values.items()}


def _short(problems: Iterable[str]) -> tuple[str, ...]:
    problems = list(problems)
    more = len(problems) - _MOST_PROBLEMS
    return (*problems[:_MOST_PROBLEMS], *([f"and {more:,} more"] if more > 0 else []))
