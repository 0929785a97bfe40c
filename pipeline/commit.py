"""Gathers GENERATED rows, which come in any order, into units, and commits each unit once.

The one place that writes rows. Runs in the process that holds the lease.
"""

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.finish import finish
from pipeline.lease import Lease
from pipeline.ledger import Ledger, now
from pipeline.plan import ids_digest
from schemas.errors import LedgerError
from schemas.extraction import load_schema
from schemas.ledger import CommitRecord, Unit, UnitKind, Work
from schemas.rows import generated_schema


@dataclass
class _Gathered:
    """The rows of one unit so far, each index once."""

    tables: list[pa.Table] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    expected: int | None = None  # known once the unit's last row is there, as is the digest
    digest: str | None = None

    def add(self, rows: pa.Table) -> None:
        """Rows that came before, from a batch that was done twice, are left out."""
        new = []
        for position, index in enumerate(rows["index"].to_pylist()):
            if index not in self.seen:
                self.seen.add(index)
                new.append(position)
        self.tables.append(rows.take(pa.array(new, pa.int64())))
        for unit_rows in rows["unit_rows"].drop_null().to_pylist():
            self.expected = unit_rows
        for digest in rows["unit_digest"].drop_null().to_pylist():
            self.digest = digest

    @property
    def whole(self) -> bool:
        """Not where a part of the rows is of one reading, and the rest of another that found others
        (a server answered only then): some would be lost or come twice."""
        if len(self.seen) != self.expected:
            return False
        return ids_digest(self.rows()["row_id"].to_pylist()) == self.digest

    def rows(self) -> pa.Table:
        return pa.concat_tables(self.tables).sort_by("index")


class Committer:
    """Holds the rows of the units in flight, and no others."""

    def __init__(self, ledger: Ledger, lease: Lease) -> None:
        self.ledger = ledger
        self._lease = lease
        schema = ledger.job["job"].get("schema")
        self._schema = generated_schema(schema and load_schema(schema), ledger.kept)
        self._metadata = _part_metadata(ledger)
        self._growth = ledger.plan.growth.number
        self._gathered: dict[int, _Gathered] = {}

    def add(self, rows: pa.Table) -> list[Work]:
        """Takes rows in the GENERATED schema with the kept columns; commits the units that are
        whole with them, and tells what was done of each. Rows of units that are done already are
        ignored.

        Raises LedgerError when the lease is lost.
        """
        rows = rows.select(self._schema.names).cast(self._schema)
        units = rows["unit"].to_numpy()
        works = []
        for unit in np.unique(units).tolist():
            if self._is_done(unit):
                continue
            gathered = self._gathered.setdefault(unit, _Gathered())
            gathered.add(rows.filter(pa.array(units == unit)))
            if gathered.whole:
                works.append(self._commit(unit, finish(gathered.rows())))
                del self._gathered[unit]
        return works

    def add_empty(self, units: pa.Table) -> pa.Table:
        """Commits those that have no rows any more, since their file has fewer now; the others, in
        the PLAN schema too."""
        empty = pc.call_function("equal", [units["rows"], pa.scalar(0)]).fill_null(False)
        nothing = finish(self._schema.empty_table())
        for unit in units.filter(empty)["unit"].to_pylist():
            self._commit(unit, nothing)
        return units.filter(pc.call_function("invert", [empty]))

    def incomplete(self) -> dict[int, int]:
        """Units of which rows came, but not all: how many came of each."""
        return {unit: len(gathered.seen) for unit, gathered in self._gathered.items()}

    def _is_done(self, unit: int) -> bool:
        return bool(self.ledger.committed()[unit]) and unit not in self.ledger.outdated()

    def _commit(self, unit: int, rows: pa.Table) -> Work:
        """rows: OUTPUT rows, all of the unit, or those of the files in it that changed."""
        work = self._work(rows)
        if self.ledger.committed()[unit]:
            record = self.ledger.record(unit)
            merged = with_changed_files(self.old_rows(record), rows, self.ledger.outdated()[unit])
            self._replace(record, merged, work, self._growth)
        else:
            self._write(unit, rows, work, [], self._growth, self.ledger.commit)
        return work

    def old_rows(self, record: CommitRecord) -> pa.Table:
        """The part of a record. Raises LedgerError when it is not what was committed."""
        try:
            data = self.ledger.read_part(record.unit)
        except Exception as error:  # storage clients raise far more than OSError
            raise LedgerError(f"cannot read {record.part}: {error}") from error
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise LedgerError(
                f"{record.part} of {self.ledger.output} is not what was committed; "
                "vl01 verify --deep tells what else is wrong"
            )
        return rows_of(data)

    def _replace(self, old: CommitRecord, rows: pa.Table, work: Work, growth: int) -> None:
        works = [*old.history(), work]
        self._write(old.unit, rows, self._work(rows), works, growth, self.ledger.replace)

    def _work(self, rows: pa.Table) -> Work:
        return Work(
            run=self._lease.run,
            at=now(),
            statuses=_counts(rows["status"]),
            reasons=_counts(rows["reason"]),
            prompt_tokens=_sum(rows["prompt_tokens"]),
            output_tokens=_sum(rows["output_tokens"]),
            tiles=_sum(rows["tiles"]),
        )

    def _write(
        self,
        unit: int,
        rows: pa.Table,
        whole: Work,
        works: list[Work],
        growth: int,
        write: Callable[[CommitRecord, bytes], None],
    ) -> None:
        """Writes the OUTPUT rows of a unit; whole counts them all. Raises LedgerError."""
        part = part_bytes(rows, self._metadata)
        record = CommitRecord(
            unit=unit,
            part=self.ledger.part_name(unit),
            rows=rows.num_rows,
            size=len(part),
            sha256=hashlib.sha256(part).hexdigest(),
            statuses=whole.statuses,
            reasons=whole.reasons,
            prompt_tokens=whole.prompt_tokens,
            output_tokens=whole.output_tokens,
            tiles=whole.tiles,
            run=whole.run,
            committed_at=whole.at,
            growth=growth,
            works=tuple(works),
        )
        try:
            self._lease.check()
            write(record, part)
        except LedgerError:
            raise
        except Exception as error:  # storage clients raise far more than OSError
            where = self.ledger.output
            raise LedgerError(f"cannot commit unit {unit} to {where}: {error}") from error


def with_changed_files(old: pa.Table, new: pa.Table, changed: Unit) -> pa.Table:
    """The rows of a unit after some of its files changed, all in one schema: new rows stand where
    the old ones of the same file were, however many there are of either."""
    if changed.kind in (UnitKind.TAR, UnitKind.PARQUET):
        return new  # of one file
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, source in enumerate(new["source"].to_pylist(), old.num_rows):
        places[source].append(place)
    takes: list[int] = []
    seen: set[str] = set()
    for place, source in enumerate(old["source"].to_pylist()):
        if source not in places:
            takes.append(place)
        elif source not in seen:
            seen.add(source)
            takes += places[source]
    takes += [place for source in places if source not in seen for place in places[source]]
    return pa.concat_tables([old, new]).take(takes)


def rows_of(part: bytes) -> pa.Table:
    """OUTPUT rows with the kept columns."""
    return pq.read_table(io.BytesIO(part)).replace_schema_metadata(None)


def part_bytes(rows: pa.Table, metadata: dict[str, str]) -> bytes:
    """A Parquet file of OUTPUT rows, zstd, with the file metadata given."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _part_metadata(ledger: Ledger) -> dict[str, str]:
    return {
        "vl01.fingerprint": json.dumps(ledger.job["fingerprint"]),
        "vl01.model": ledger.job["job"]["model"],
        "vl01.quantization": ledger.job["job"]["quantization"],
        "vl01.random_weights": json.dumps(ledger.job["job"]["random_weights"]),
        "vl01.version": ledger.job["versions"]["vl01-batch"],
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return dict(sorted(Counter(column.drop_null().to_pylist()).items()))


def _sum(column: pa.ChunkedArray) -> int:
    return sum(column.drop_null().to_pylist())
