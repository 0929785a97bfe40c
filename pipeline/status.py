"""How a dataset stands, from its ledger alone: `vl01 status`, from any machine, also mid-run.

Lists the commit records, and reads some of them: reading a million takes minutes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from pipeline.fingerprint import no_dataset
from pipeline.lease import Holder, read_holder
from pipeline.ledger import Ledger
from schemas.ledger import CommitRecord

RECORDS = 2000  # all are read when there are no more
NEWEST = 500  # else these, for the pace, and a sample of all of them, for the counts
WINDOW_S = 600.0
_SEED = 0
_THREADS = 32


@dataclass(frozen=True)
class Pace:
    """Of the run that committed last, over `seconds` that end now, or, when no run is alive, at
    its last commit."""

    rows_per_second: float
    units_per_second: float
    seconds: float


@dataclass(frozen=True)
class Status:
    """What `status` found.

    planned_units: None while the first run still lists the source. outdated_units: committed, with
    files that changed since and are to be done again. records: how many were read of
    committed_units; rows, statuses and reasons are scaled up from them when they are fewer.
    last_commit: of the newest record, in UTC. alive: whether the holder's run seems to go on.
    """

    output: str
    planned_units: int | None
    committed_units: int
    outdated_units: int
    records: int
    rows: int
    statuses: dict[str, int]
    reasons: dict[str, int]
    last_commit: datetime | None
    pace: Pace | None
    holder: Holder | None
    alive: bool

    @property
    def exact(self) -> bool:
        return self.records == self.committed_units

    @property
    def pending_units(self) -> int:
        return (self.planned_units or 0) - self.committed_units + self.outdated_units

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the last minutes; None when no run is alive or its pace is not known."""
        if not (self.alive and self.pace and self.pace.units_per_second):
            return None
        return self.pending_units / self.pace.units_per_second


def status(output: str, endpoint_url: str | None = None) -> Status:
    """Writes nothing and takes no lease. Raises ConfigError when OUT is no dataset of this tool,
    LedgerError when what it holds is damaged.
    """
    ledger = Ledger(output, endpoint_url)
    planned = ledger.resume()
    holder = read_holder(ledger)
    if not planned and holder is None:
        raise no_dataset(ledger.output)
    done = np.flatnonzero(ledger.committed()) if planned else np.zeros(0, np.int64)
    newest, sample = _read_some(ledger, done)
    alive = holder is not None and holder.seems_alive()
    scale = len(done) / len(sample) if sample else 1.0
    return Status(
        output=ledger.output,
        planned_units=ledger.totals.units if planned else None,
        committed_units=len(done),
        outdated_units=len(ledger.outdated()) if planned else 0,
        records=len(sample),
        rows=round(sum(record.rows for record in sample) * scale),
        statuses=_scaled((record.statuses for record in sample), scale),
        reasons=_scaled((record.reasons for record in sample), scale),
        last_commit=max(map(_time, newest), default=None),
        pace=_pace(newest, datetime.now(UTC) if alive else None),
        holder=holder,
        alive=alive,
    )


def _read_some(ledger: Ledger, done: np.ndarray) -> tuple[list[CommitRecord], list[CommitRecord]]:
    """The newest records, and a sample of all: both are all of them when there are few.

    Newest are those of the highest units: a run does units in their order.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        if len(done) <= RECORDS:
            records = list(pool.map(ledger.record, done.tolist()))
            return records, records
        chosen = np.random.default_rng(_SEED).choice(done, RECORDS, replace=False)
        newest = list(pool.map(ledger.record, done[-NEWEST:].tolist()))
        return newest, list(pool.map(ledger.record, chosen.tolist()))


def _scaled(counts: Iterable[dict[str, int]], scale: float) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return {name: round(count * scale) for name, count in total.most_common()}


def _pace(records: Sequence[CommitRecord], now: datetime | None) -> Pace | None:
    """Of the run that committed last; the first of the commits in the window only starts it."""
    timed = sorted((_time(record), record.unit, record.history()[-1]) for record in records)
    if not timed:
        return None
    run = timed[-1][2].run
    end = now or timed[-1][0]
    recent = [
        (at, work)
        for at, _, work in timed
        if work.run == run and (end - at).total_seconds() <= WINDOW_S
    ]
    if len(recent) < 2:
        return None
    seconds = (end - recent[0][0]).total_seconds()
    if seconds <= 0:
        return None
    rows = sum(work.rows for _, work in recent[1:])
    return Pace(rows / seconds, (len(recent) - 1) / seconds, seconds)


def _time(record: CommitRecord) -> datetime:
    return datetime.fromisoformat(record.committed_at)
