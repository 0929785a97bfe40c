"""Does some rows of a dataset again: `vl01 retry`. Which rows those are, and how they are found.

The flow is run.py's; what becomes of the rows that come out is for replacer.py.
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.commit import rows_of
from pipeline.documents import write_documents
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.model import model_revision, open_model
from pipeline.plan import plan_table, units_of
from pipeline.progress import Progress
from pipeline.read import read_settings
from pipeline.replacer import Replacer, RetrySummary, stand_ins
from pipeline.run import work
from pipeline.sources import open_source
from pipeline.stop import Stop
from pipeline.tally import Tally
from schemas.errors import EngineError
from schemas.job import Job
from schemas.ledger import RETRY_PLAN, CommitRecord, Unit

_THREADS = 32
_AHEAD = 1024


@dataclass(frozen=True)
class Choice:
    """Rows by status and, if any are given, by reason."""

    statuses: frozenset[str]
    reasons: frozenset[str] = frozenset()

    def among(self, record: CommitRecord) -> bool:
        """Whether the part of a record may hold such rows."""
        return any(record.statuses.get(status) for status in self.statuses) and (
            not self.reasons or any(record.reasons.get(reason) for reason in self.reasons)
        )

    def holds(self, row: dict[str, Any]) -> bool:
        return row["status"] in self.statuses and (
            not self.reasons or row["reason"] in self.reasons
        )


def retry(
    job: Job, choice: Choice, changed: Mapping[str, float] = MappingProxyType({})
) -> RetrySummary:
    """Does the chosen rows of the committed units again. changed: keys of RETRY_MAY_CHANGE, with
    what they are for these rows; the dataset's job stays as it is.

    A row is replaced by what came out of it now, unless that is worse. What was replaced before
    the retry ended early stays; the same call does the rest, and what failed once more again.
    Raises what `run` does.
    """
    started = time.monotonic()
    # They are known to fail.
    asked = job.model_copy(update={**changed, "max_failure_rate": 1.0})
    model = open_model(job)
    source = open_source(job.source, job.endpoint_url)
    read = read_settings(job, source, model.page_settings(job))
    ledger = Ledger(job.output, job.endpoint_url)
    ledger.prepare()
    progress = Progress()
    progress.phase = "looking for the rows to do again"
    with Stop(job.grace_seconds, progress.stopping) as stop, Lease(ledger) as lease, progress:
        ledger.resume(job.fingerprint(model_revision(job)))
        ledger.clean_up()
        pending = chosen(ledger, choice)
        replacer = Replacer(ledger, lease, pending, changed)
        if pending.num_rows:
            progress.start(pending.num_rows, "starting Ray, loading the model, doing rows again")
            read = replace(read, kept=ledger.kept)
            tally = Tally(progress, "retry", changed)
            with tally.recorded(ledger, lease.run):
                work(asked, model, read, pending, replacer, tally, stop)
        if replacer.left:
            raise EngineError(
                f"{replacer.left:,} of {pending.num_rows:,} units are not done again; the same"
                " command does the rest"
            )
        write_documents(job, ledger, source)
    return replacer.summary(time.monotonic() - started)


def chosen(ledger: Ledger, choice: Choice) -> pa.Table:
    """The units with chosen rows, in the RETRY_PLAN schema. Reads every commit record, and of
    the parts that hold such rows what tells them."""
    tables = [RETRY_PLAN.empty_table()]
    with ThreadPoolExecutor(_THREADS) as pool:
        for units in _committed(ledger):
            found = pool.map(lambda unit: _narrow(ledger, unit, choice), units)
            tables.append(_retry_table([unit for unit in found if unit]))
    return pa.concat_tables(tables)


def _committed(ledger: Ledger) -> Iterator[list[Unit]]:
    done = ledger.committed()
    for table in ledger.planned():
        for start in range(0, table.num_rows, _AHEAD):  # `map` does not wait for its reader
            units = units_of(table.slice(start, _AHEAD))
            yield [unit for unit in units if done[unit.number]]


def _narrow(ledger: Ledger, unit: Unit, choice: Choice) -> Unit | None:
    """The unit, of which only the chosen rows are left; None if there are none.

    A row that stands for all that could not be read of a file (the tail of a cut tar, a PDF that
    does not open) becomes all the rows that are not known yet.
    """
    if not choice.among(ledger.record(unit.number)):
        return None
    part = rows_of(ledger.read_part(unit.number))
    part = part.select(["row_id", "member", "status", "reason"]).to_pylist()
    again = frozenset(row["row_id"] for row in part if choice.holds(row))
    unit = unit.narrowed({row["member"] for row in part if row["row_id"] in again})
    if stand_ins(unit) & again:
        return replace(unit, but=frozenset(row["row_id"] for row in part) - again)
    return replace(unit, only=again) if again else None


def _retry_table(units: list[Unit]) -> pa.Table:
    table = plan_table(units)
    only = [None if unit.only is None else sorted(unit.only) for unit in units]
    values = [*table.columns, pa.array(only, RETRY_PLAN.field("only").type)]
    values.append(pa.array([sorted(unit.but) for unit in units], RETRY_PLAN.field("but").type))
    return pa.table(values, RETRY_PLAN)
