"""Gathers GENERATED rows, which come in any order, into units, and commits each unit once.

The one place that writes rows. Runs in the process that holds the lease.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.finish import finish
from pipeline.lease import Lease
from pipeline.ledger import Ledger, now
from schemas.errors import LedgerError
from schemas.extraction import load_schema
from schemas.ledger import CommitRecord
from schemas.rows import GENERATED, with_extraction, with_kept


@dataclass
class _Gathered:
    """The rows of one unit so far, each index once."""

    tables: list[pa.Table] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    expected: int | None = None  # known once the unit's last row is there

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

    @property
    def whole(self) -> bool:
        return len(self.seen) == self.expected

    def rows(self) -> pa.Table:
        return pa.concat_tables(self.tables).sort_by("index")


class Committer:
    """Holds the rows of the units in flight, and no others."""

    def __init__(self, ledger: Ledger, lease: Lease) -> None:
        self._ledger = ledger
        self._lease = lease
        self._schema = _generated_schema(ledger)
        self._metadata = _part_metadata(ledger)
        self._done = ledger.committed()  # and kept up to date by the ledger
        self._gathered: dict[int, _Gathered] = {}

    def add(self, rows: pa.Table) -> list[CommitRecord]:
        """Takes rows in the GENERATED schema with the kept columns; commits the units that are
        whole with them. Rows of units that are committed already are ignored.

        Raises LedgerError when the lease is lost.
        """
        rows = rows.select(self._schema.names).cast(self._schema)
        units = rows["unit"].to_numpy()
        records = []
        for unit in np.unique(units).tolist():
            if self._done[unit]:
                continue
            gathered = self._gathered.setdefault(unit, _Gathered())
            gathered.add(rows.filter(pa.array(units == unit)))
            if gathered.whole:
                records.append(self._commit(unit, gathered.rows()))
                del self._gathered[unit]
        return records

    def incomplete(self) -> dict[int, int]:
        """Units of which rows came, but not all: how many came of each."""
        return {unit: len(gathered.seen) for unit, gathered in self._gathered.items()}

    def _commit(self, unit: int, generated: pa.Table) -> CommitRecord:
        return self._write(unit, finish(generated), self._ledger.commit)

    def _write(
        self, unit: int, rows: pa.Table, write: Callable[[CommitRecord, bytes], None]
    ) -> CommitRecord:
        """Writes the OUTPUT rows of a unit. Raises LedgerError."""
        part = part_bytes(rows, self._metadata)
        record = CommitRecord(
            unit=unit,
            part=self._ledger.part_name(unit),
            rows=rows.num_rows,
            size=len(part),
            sha256=hashlib.sha256(part).hexdigest(),
            statuses=_counts(rows["status"]),
            reasons=_counts(rows["reason"]),
            prompt_tokens=_sum(rows["prompt_tokens"]),
            output_tokens=_sum(rows["output_tokens"]),
            run=self._lease.run,
            committed_at=now(),
        )
        try:
            self._lease.check()
            write(record, part)
        except LedgerError:
            raise
        except Exception as error:  # storage clients raise far more than OSError
            where = self._ledger.output
            raise LedgerError(f"cannot commit unit {unit} to {where}: {error}") from error
        return record


def part_bytes(rows: pa.Table, metadata: dict[str, str]) -> bytes:
    """A Parquet file of OUTPUT rows, zstd, with the file metadata given."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _generated_schema(ledger: Ledger) -> pa.Schema:
    schema = GENERATED
    if text := ledger.job["job"].get("schema"):
        asked = load_schema(text)
        schema = with_extraction(GENERATED, asked.arrow_type, asked.confidence_type)
    return with_kept(schema, ledger.kept)


def _part_metadata(ledger: Ledger) -> dict[str, str]:
    return {
        "vl01.fingerprint": json.dumps(ledger.job["fingerprint"]),
        "vl01.model": ledger.job["job"]["model"],
        "vl01.quantization": ledger.job["job"]["quantization"],
        "vl01.version": ledger.job["versions"]["vl01-batch"],
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return dict(sorted(Counter(column.drop_null().to_pylist()).items()))


def _sum(column: pa.ChunkedArray) -> int:
    return sum(column.drop_null().to_pylist())
