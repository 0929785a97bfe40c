"""Cuts a source into units: images, documents and addresses in groups, tars whole, Parquet at row
groups.

One pass, in the order of the names. Opens nothing but lists and the footers of Parquet files.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.columns import KeptColumns, find_column, no_column
from pipeline.listing import SourceFile
from pipeline.lists import AddressList
from pipeline.slices import Documents, Slice, beyond, cut, list_slice
from pipeline.sources import Source, kind_of
from pipeline.storage import PatientFile
from schemas.errors import ConfigError
from schemas.job import Job
from schemas.ledger import PLAN, Unit, UnitKind

_FOOTER_THREADS = 32
_FOOTERS_AHEAD = 256


class _Footer(NamedTuple):
    """What planning needs of a Parquet file; `problem` says why it has no rows to plan."""

    schema: pa.Schema | None
    group_rows: list[int]
    problem: str | None = None


class Plan:
    """The units of a source, and the schema of the kept columns, in one pass over both."""

    def __init__(
        self,
        source: Source,
        unit_rows: int,
        image_column: str | None = None,
        keep: tuple[str, ...] = (),
        uri_column: str | None = None,
        settle_seconds: float | None = None,
        kept: pa.Schema | None = None,
    ) -> None:
        """settle_seconds: files written more recently are left out. kept: the schema of the kept
        columns of a plan that this one adds to."""
        self._source = source
        self._unit_rows = unit_rows
        self._image_column = image_column
        self._uri_column = uri_column
        self._settle_seconds = settle_seconds
        self._kept = KeptColumns(keep, kept)
        self._problem: str | None = None  # of the first file that has one
        self._usable = kept is not None
        self.unread: Counter[str] = Counter()  # files left out for their names, by ending

    @classmethod
    def of(cls, job: Job, source: Source, kept: pa.Schema | None = None) -> "Plan":
        """The plan that a job asks for."""
        settle_seconds = job.settle_seconds if job.grow else None
        columns = job.image_column, job.keep, job.uri_column
        return cls(source, job.unit_rows, *columns, settle_seconds, kept)

    def files(self) -> Iterator[SourceFile]:
        """What the source lists, but for files that are perhaps not whole yet."""
        return filter(self.is_settled, self._source.files(self.unread))

    def is_settled(self, file: SourceFile) -> bool:
        """Whether nobody seems to be writing it any more, as far as this plan must know."""
        if self._settle_seconds is None or file.modified is None:
            return True
        # Another machine's clock may be ahead of ours, but a time far ahead is just wrong.
        return abs(time.time() - file.modified) >= self._settle_seconds

    def units(self, files: Iterable[SourceFile] | None = None, first: int = 0) -> Iterator[Unit]:
        """Streams the units of `files` (default: all there are), numbered from `first`. A Parquet
        file that cannot be used is a unit too, of one failed row.

        Raises ConfigError when nothing at all can be used, or a column cannot be kept.
        """
        slices = self._slices(self.files() if files is None else files)
        for number, slice_ in enumerate(slices, first):
            yield Unit(number, *slice_)
        if not self._usable and self._problem:
            raise ConfigError(self._problem)

    def kept(self) -> pa.Schema:
        """The columns to carry over; known once `units` has run out. Raises ConfigError."""
        return self._kept.schema()

    def _slices(self, files: Iterable[SourceFile]) -> Iterator[Slice]:
        images: list[str] = []
        documents = Documents()
        parquets: list[str] = []
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            for file in files:
                name, kind = file.name, kind_of(file.name)
                if kind is UnitKind.PARQUET:
                    parquets.append(name)
                    if len(parquets) == _FOOTERS_AHEAD:
                        yield from self._parquet_slices(pool, parquets)
                        parquets = []
                    continue
                if kind is UnitKind.LIST:
                    yield from self._list_slices(name)
                    continue
                self._usable = True
                if kind is UnitKind.TAR:
                    yield Slice(UnitKind.TAR, (name,))
                elif kind is UnitKind.DOCUMENTS:
                    yield from documents.add(file)
                else:
                    images.append(name)
                if len(images) == self._unit_rows:
                    yield Slice(UnitKind.IMAGES, tuple(images), 0, len(images))
                    images = []
            if images:
                yield Slice(UnitKind.IMAGES, tuple(images), 0, len(images))
            yield from documents.rest()
            yield from self._parquet_slices(pool, parquets)

    def _list_slices(self, name: str) -> Iterator[Slice]:
        with self._open_list(name) as addresses:
            for group in addresses.groups(self._unit_rows):
                yield list_slice(name, group)
                self._usable = True

    @contextmanager
    def _open_list(self, name: str) -> Iterator[AddressList]:
        address = self._source.full_address(name)
        try:
            file = PatientFile(self._source.fs, self._source.path(name))
        except Exception as error:  # storage clients raise far more than OSError
            raise ConfigError(f"cannot read {address}: {error}") from error
        with file:
            addresses = AddressList(file, address, self._uri_column, self._kept.keep)
            yield addresses
        kept = sorted(addresses.kept)
        self._kept.add(pa.schema([(column, pa.string()) for column in kept]), address)
        self._problem = self._problem or f"{address} holds no address"

    def _parquet_slices(self, pool: ThreadPoolExecutor, names: list[str]) -> Iterator[Slice]:
        for name, footer in zip(names, pool.map(self._footer, names), strict=True):
            if footer.schema is not None:
                self._kept.add(footer.schema, name)
            if footer.problem:
                self._problem = (
                    self._problem or f"{self._source.full_address(name)}: {footer.problem}"
                )
                yield Slice(UnitKind.PARQUET, (name,))
                continue
            self._usable = True
            for first_row, rows in cut(footer.group_rows, self._unit_rows):
                yield Slice(UnitKind.PARQUET, (name,), first_row, rows)

    def again(self, units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
        """What has become of the units that one file was cut into, now that it is another: those
        that are to be done again, as they are now, and new ones, which have no number yet (-1).
        """
        name = units[0].names[0]
        again = self._list_again if units[0].kind is UnitKind.LIST else self._parquet_again
        return again(name, units)

    def _list_again(self, name: str, units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
        """Addresses that were not in the list before are new; the others are not asked again."""
        known = {member for unit in units for member in unit.names[1:]}
        with self._open_list(name) as addresses:
            new = [list_slice(name, group) for group in addresses.new(known, self._unit_rows)]
        return [], [Unit(-1, *slice_) for slice_ in new]

    def _parquet_again(self, name: str, units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
        """Units keep to their range of rows, so that no row is ever in two."""
        footer = self._footer(name)
        if footer.schema is not None:
            self._kept.add(footer.schema, name)
        if footer.problem:  # a row in the first unit says so
            rows = [None, *[0] * (len(units) - 1)]
            return [replace(unit, rows=n) for unit, n in zip(units, rows, strict=True)], []
        last = units[-1]
        ends = [unit.first_row for unit in units[1:]]
        ends.append(last.first_row + (last.rows or self._unit_rows))
        in_all = sum(footer.group_rows)
        again = [
            replace(unit, rows=max(0, min(end, in_all) - unit.first_row))
            for unit, end in zip(units, ends, strict=True)
        ]
        more = cut(beyond(footer.group_rows, ends[-1]), self._unit_rows)
        new = [Unit(-1, UnitKind.PARQUET, (name,), ends[-1] + first, rows) for first, rows in more]
        return again, new

    def _footer(self, name: str) -> _Footer:
        try:
            with PatientFile(self._source.fs, self._source.path(name), cache_type="none") as file:
                metadata = pq.ParquetFile(file).metadata
                schema = metadata.schema.to_arrow_schema()
        except Exception as error:  # the storage's errors and the parser's are of many classes
            return _Footer(None, [], f"cannot be read as Parquet: {error}")
        columns = self._image_column, self._uri_column
        if find_column(schema, *columns) is None:
            return _Footer(schema, [], no_column(schema, *columns))
        if metadata.num_rows == 0:
            return _Footer(schema, [], "holds no rows")
        groups = range(metadata.num_row_groups)
        return _Footer(schema, [metadata.row_group(group).num_rows for group in groups])


def row_id(name: str, member: str | None = None, page: int | None = None) -> str:
    """32 hex characters that depend on the names below the source's root alone, so the same
    data set has the same ids, and therefore the same texts, on a disk and in a bucket."""
    key = json.dumps([name, member, page], ensure_ascii=False)
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def ids_digest(ids: Iterable[str]) -> str:
    """Of row ids in the order of a unit."""
    return hashlib.sha256("".join(ids).encode()).hexdigest()


def planned_row_ids(unit: Unit) -> list[str] | None:
    """The ids of the rows a unit must become; None where it must be read to know."""
    if unit.rows is None:
        return None
    if unit.kind in (UnitKind.IMAGES, UnitKind.LIST):
        return [row_id(*item) for item in unit.items]
    rows = range(unit.first_row, unit.first_row + unit.rows)
    return [row_id(unit.names[0], str(row)) for row in rows]


def plan_table(units: Sequence[Unit]) -> pa.Table:
    """Units as rows in the PLAN schema; what only a retry knows is left out."""
    values = {
        "unit": [unit.number for unit in units],
        "kind": [unit.kind.value for unit in units],
        "names": [unit.names for unit in units],
        "first_row": [unit.first_row for unit in units],
        "rows": [unit.rows for unit in units],
    }
    return pa.table(values, PLAN)


def units_of(table: pa.Table) -> Iterator[Unit]:
    """The units that a table in the PLAN or RETRY_PLAN schema tells of."""
    for row in table.to_pylist():
        only, but = row.get("only"), row.get("but")
        yield Unit(
            number=row["unit"],
            kind=UnitKind(row["kind"]),
            names=tuple(row["names"]),
            first_row=row["first_row"],
            rows=row["rows"],
            only=None if only is None else frozenset(only),
            but=frozenset(but or ()),
        )
