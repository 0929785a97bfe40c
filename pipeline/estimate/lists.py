"""What a run over lists of addresses will do, for its report. Nothing is fetched for it: the run
itself does, once. So rows are taken to be like those of an earlier run on the same output."""

import pyarrow as pa

from pipeline.estimate.estimate import ranks_busy
from pipeline.estimate.throughput import find_throughput, time_estimate
from pipeline.ledger import Ledger
from pipeline.model import Model
from pipeline.plan import units_of
from pipeline.report.runs import run_records
from schemas.estimate import Assumptions
from schemas.job import Job
from schemas.report import Foretold, RunRecord
from schemas.rows import Status

_LATEST = 10  # runs, of which the largest tells


def foretold_of_lists(job: Job, model: Model, ledger: Ledger, pending: pa.Table) -> Foretold:
    """An address counts as a row, though there may be a document of many pages."""
    rows = sum(len(unit.items) for unit in units_of(pending))
    busy = ranks_busy(job, model)
    if (run := _earlier(ledger)) is None:
        return Foretold(rows, 0, 0, 0, exact=False, looked=False, rank_busy=busy)
    alike = rows / sum(run.rows.values())
    failed = round(run.rows.get(Status.FAILED, 0) * alike)
    tokens, answered = round(run.prompt_tokens * alike), rows - failed
    prompt = tokens / max(1, answered)
    speed = find_throughput(job, model.config.text, ledger, Assumptions(), prompt)
    time = speed and time_estimate(speed, tokens, answered, None)
    return Foretold(
        rows=rows,
        failed=failed,
        tiles=round(run.tiles * alike),
        prompt_tokens=tokens,
        exact=False,
        looked=False,
        seconds=time and time.seconds,
        gpu_hours=time and time.gpu_hours,
        speed=speed and speed.origin,
        rank_busy=busy,
    )


def _earlier(ledger: Ledger) -> RunRecord | None:
    runs = sorted(run_records(ledger)[0].values(), key=lambda run: run.run)
    did = [run for run in runs if run.what == "run" and run.prompt_tokens][-_LATEST:]
    return max(did, key=lambda run: sum(run.rows.values()), default=None)
