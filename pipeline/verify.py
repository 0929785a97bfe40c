"""Whether every planned row is in OUT, once. Reads the output and its ledger, never the source."""

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.commit import rows_of
from pipeline.ledger import Ledger
from pipeline.plan import planned_row_ids, row_id, units_of
from pipeline.storage import PatientFile
from schemas.ledger import CommitRecord, Unit, UnitKind

_THREADS = 16
_AHEAD = 256
_MOST_PROBLEMS = 100  # told one by one


@dataclass(frozen=True)
class Verification:
    """What `verify` found. A pending unit has no record: the run is not finished. Nor is it when
    committed units are outdated: some of their files changed and are to be done again.

    rows, statuses, reasons: of the committed units, as their records say. missing_rows: planned
    in committed units and not in their parts. doubled_rows: ids that come more than once.
    unrecorded_parts: files that no record speaks for, whose rows come on top.
    problems: one line for each thing that is wrong, the first hundred.
    """

    output: str
    planned_units: int
    committed_units: int
    outdated_units: int
    rows: int
    statuses: dict[str, int]
    reasons: dict[str, int]
    missing_rows: int
    doubled_rows: int
    unrecorded_parts: tuple[str, ...]
    damaged_units: int
    problems: tuple[str, ...]

    @property
    def pending_units(self) -> int:
        return self.planned_units - self.committed_units

    @property
    def ok(self) -> bool:
        """Every planned row is there once."""
        return not (self.pending_units or self.outdated_units or self.problems)


@dataclass(frozen=True)
class _Checked:
    """One committed unit. heads: the first 8 bytes of each row id."""

    unit: int
    record: CommitRecord | None
    heads: bytes = b""
    missing: int = 0
    problem: str | None = None


def verify(output: str, endpoint_url: str | None = None, deep: bool = False) -> Verification:
    """Checks the whole dataset: a record for each unit, its part with the rows and bytes it says,
    the planned row ids in it, and no row id twice anywhere. `deep` reads every part whole and
    compares its sha256; else only its row ids are read.

    Memory: 8 bytes a row, so 0.8 GB for 1e8 rows. Raises ConfigError when OUT is no dataset of
    this tool.
    """
    ledger = Ledger.of_dataset(output, endpoint_url)
    done = ledger.committed()
    heads = array("Q")
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    problems = _Problems()
    missing = damaged = 0
    for checked in _check_all(ledger, done, deep):
        heads.frombytes(checked.heads)
        missing += checked.missing
        if checked.record:
            statuses.update(checked.record.statuses)
            reasons.update(checked.record.reasons)
        if checked.problem:
            damaged += 1
            problems.add(f"unit {checked.unit}: {checked.problem}")
    doubled = _doubled(ledger, done, heads)
    for one, units in doubled.items():
        problems.add(f"row {one} is there {len(units)} times, in units {units}")
    unrecorded = [ledger.part_name(n) for n in ledger.parts() if n >= len(done) or not done[n]]
    for part in unrecorded:
        problems.add(
            f"{part} has no commit record: its rows do not count, but are read with OUT; the"
            " command that started the run removes it"
        )
    strangers = ledger.strangers()
    for file in strangers:
        problems.add(f"{file} is of no run, but its rows are read with OUT; move it elsewhere")
    return Verification(
        output=ledger.output,
        planned_units=len(done),
        committed_units=int(done.sum()),
        outdated_units=len(ledger.outdated()),
        rows=sum(statuses.values()),
        statuses=dict(statuses),
        reasons=dict(reasons),
        missing_rows=missing,
        doubled_rows=len(doubled),
        unrecorded_parts=tuple(sorted(unrecorded) + strangers),
        damaged_units=damaged,
        problems=problems.lines(),
    )


class _Problems:
    """Counts them all, keeps the first."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0

    def add(self, line: str) -> None:
        self._count += 1
        if self._count <= _MOST_PROBLEMS:
            self._lines.append(line)

    def lines(self) -> tuple[str, ...]:
        more = self._count - len(self._lines)
        return (*self._lines, *([f"and {more:,} more"] if more else []))


def _check_all(ledger: Ledger, done: np.ndarray, deep: bool) -> Iterator[_Checked]:
    outdated = ledger.outdated()
    with ThreadPoolExecutor(_THREADS) as pool:
        for table in ledger.planned():
            committed = [unit for unit in units_of(table) if done[unit.number]]
            for i in range(0, len(committed), _AHEAD):  # `map` does not wait for its reader
                yield from pool.map(
                    lambda unit: _check(ledger, unit, deep, outdated), committed[i : i + _AHEAD]
                )


def _check(ledger: Ledger, unit: Unit, deep: bool, outdated: Collection[int]) -> _Checked:
    planned = None if unit.number in outdated else planned_row_ids(unit)
    record = None
    try:
        record = ledger.record(unit.number)
        record, ids = _recorded_ids(ledger, record, deep)
        accounted = set(ids)
        if planned and unit.kind is UnitKind.PARQUET and accounted != set(planned):
            accounted = _with_pages_joined(ledger, unit)
    except Exception as error:  # missing, cut, unreadable: of many classes
        missing = unit.rows or (record.rows if record else 0)
        return _Checked(unit.number, record, b"", missing, " ".join(str(error).split()))
    if planned is None:
        expected, absent = record.rows, max(0, record.rows - len(ids))
        foreign = max(0, len(ids) - record.rows)
    else:
        expected = len(planned)
        absent, foreign = len(set(planned) - accounted), len(accounted - set(planned))
    problem = None
    if absent or foreign:
        problem = (
            f"{record.part} has {len(ids)} rows, expected {expected}: "
            f"{absent} missing, {foreign} that were not planned"
        )
    return _Checked(unit.number, record, _heads(ids), absent, problem)


def _recorded_ids(
    ledger: Ledger, record: CommitRecord, deep: bool
) -> tuple[CommitRecord, list[str]]:
    """The row ids of a part, and its true record: another one where a retry was cut short."""
    try:
        return record, _row_ids(ledger, record, deep)
    except ValueError:
        if replacement := ledger.replacement(record.unit):
            return replacement, _row_ids(ledger, replacement, deep)
        raise


def _with_pages_joined(ledger: Ledger, unit: Unit) -> set[str]:
    """The row ids of a part; the pages of a document count as the row they were planned as."""
    rows = rows_of(ledger.read_part(unit.number)).select(["row_id", "member", "page"]).to_pylist()
    name = unit.names[0]
    return {
        row_id(name, row["member"])
        if row["row_id"] == row_id(name, row["member"], row["page"])
        else row["row_id"]
        for row in rows
    }


def _row_ids(ledger: Ledger, record: CommitRecord, deep: bool) -> list[str]:
    """The row ids of a part, which must be as its record says; ValueError if it is not."""
    path = ledger.part_path(record.unit)
    with PatientFile(ledger.fs, path, cache_type="none") as file:
        if file.size != record.size:
            raise ValueError(f"{record.part} has {file.size} bytes, its record says {record.size}")
        source: Any = file
        if deep:
            data = file.read()
            if hashlib.sha256(data).hexdigest() != record.sha256:
                raise ValueError(f"{record.part} is not what was committed: another sha256")
            source = io.BytesIO(data)
        ids = pq.ParquetFile(source).read(["row_id"])["row_id"].to_pylist()
    if len(ids) != record.rows or sum(record.statuses.values()) != record.rows:
        raise ValueError(f"{record.part} has {len(ids)} rows, its record says {record.rows}")
    return ids


def _heads(ids: list[str]) -> bytes:
    return np.frombuffer(bytes.fromhex("".join(ids)), np.uint64)[::2].tobytes()


def _doubled(ledger: Ledger, done: np.ndarray, heads: array) -> dict[str, list[int]]:
    """Row ids that come more than once, and the units they are in.

    Half of each id is compared first. At 1e8 rows two different ids agree in it once in 3,000
    datasets, so where halves agree the whole ids are read again.
    """
    sorted_heads = np.frombuffer(heads, np.uint64) if heads else np.zeros(0, np.uint64)
    sorted_heads.sort()
    suspects = np.unique(sorted_heads[1:][sorted_heads[1:] == sorted_heads[:-1]])
    if not len(suspects):
        return {}
    units: dict[str, list[int]] = {}
    for unit in np.flatnonzero(done).tolist():
        try:
            _, ids = _recorded_ids(ledger, ledger.record(unit), deep=False)
        except Exception:  # already told by _check
            continue
        mine = np.frombuffer(_heads(ids), np.uint64)
        for position in np.flatnonzero(np.isin(mine, suspects)).tolist():
            units.setdefault(ids[position], []).append(unit)
    return {row_id: found for row_id, found in units.items() if len(found) > 1}
