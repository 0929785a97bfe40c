"""The rows of a slice of a Parquet file: its images as they are, and the columns that are kept."""

import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as t

from pipeline.columns import find_column, no_column
from pipeline.fetch.fetch import Fetcher, absolute
from pipeline.formats.row import (
    STREAM_BYTES,
    TABLE_BYTES,
    TABLE_ROWS,
    ReadSettings,
    Row,
    blame,
    check_size,
    read_file,
    read_row,
    row_error,
)
from pipeline.plan import row_id
from pipeline.storage import PatientFile
from schemas.errors import Reason, RowError
from schemas.ledger import Unit

_MOST_ADDRESSES = 256  # read at a time, so that many of them can be fetched at once


def parquet_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    """Exactly the rows that were planned: those that cannot be read any more are failed rows.

    A file that had no rows to plan gives those it turns out to have, or one failed row.
    """
    (name,) = unit.names
    row, error = unit.first_row, None
    end = None if unit.rows is None else unit.first_row + unit.rows
    try:
        for found in _rows_of_file(unit, row, end, settings):
            yield found
            row += 1
    except RowError as caught:
        error = caught
    if end is not None:
        changed = row_error(Reason.SOURCE_DAMAGED, f"it has only {row:,} rows now; it was changed")
        for missing in range(row, end):
            yield Row(name, str(missing), error=error or changed)
    elif error or row == 0:
        yield Row(name, None, error=error or row_error(Reason.EMPTY_SOURCE, "it holds no rows"))


def _rows_of_file(unit: Unit, first: int, end: int | None, settings: ReadSettings) -> Iterator[Row]:
    """Rows first to end, as far as they can be read; then raises RowError."""
    (name,) = unit.names
    fs, path = settings.source.fs, settings.source.path(name)
    file = None
    try:
        # Without a cache: columns are read in turns, far apart, and pyarrow buffers each itself.
        with PatientFile(fs, path, cache_type="none") as file:
            parquet = pq.ParquetFile(file, buffer_size=STREAM_BYTES, pre_buffer=False)
            schema = parquet.schema_arrow
            choice = settings.image_column, settings.uri_column
            column = find_column(schema, *choice)
            if column is None:
                raise row_error(Reason.MISSING_COLUMN, no_column(schema, *choice))
            columns = dict.fromkeys(
                [column, *(n for n in settings.kept.names if n in schema.names)]
            )
            rows_of, most_rows = _rows_of_batch, TABLE_ROWS
            if settings.uri_column is not None:
                rows_of, most_rows = _rows_by_address, _MOST_ADDRESSES
            for row, batch in _batches(parquet, list(columns), first, end, most_rows):
                yield from rows_of(unit, row, batch, column, settings)
    except Exception as error:  # pyarrow's errors are of many classes
        raise blame(error, file) from error


def _batches(
    parquet: pq.ParquetFile, columns: list[str], first: int, end: int | None, most_rows: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(its first row, a batch) of rows first to end, few enough to be of bounded size.

    One row group at a time: a batch over two of them would be lost when the second is damaged.
    """
    start = 0
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        if start + group.num_rows <= first or (end is not None and start >= end):
            start += group.num_rows
            continue
        row_bytes = max(1, group.total_byte_size // group.num_rows)
        batch_rows = min(most_rows, max(1, TABLE_BYTES // row_bytes))
        for batch in parquet.iter_batches(batch_rows, [number], columns, use_threads=False):
            skip = max(0, first - start)
            stop = batch.num_rows if end is None else min(batch.num_rows, end - start)
            if skip < stop:
                yield start + skip, batch.slice(skip, stop - skip)
            start += batch.num_rows


def _rows_of_batch(
    unit: Unit, first: int, batch: pa.RecordBatch, column: str, settings: ReadSettings
) -> Iterator[Row]:
    (name,) = unit.names
    images = batch.column(column)
    kept = kept_columns(batch, settings.kept)
    for i in range(batch.num_rows):
        row = read_row(unit, name, str(first + i), lambda i=i: _image(images[i], name, settings))
        yield row._replace(kept=kept.slice(i, 1))


def _rows_by_address(
    unit: Unit, first: int, batch: pa.RecordBatch, column: str, settings: ReadSettings
) -> Iterator[Row]:
    (name,) = unit.names
    addresses = [(text or "").strip() for text in batch.column(column).to_pylist()]
    kept = kept_columns(batch, settings.kept)
    beside = settings.source.full_address(name)
    null = row_error(Reason.MISSING_IMAGE, "no address in its column")

    def wanted() -> Iterator[tuple[int, str | None]]:
        for i, address in enumerate(addresses):
            asked = address and unit.wants(row_id(name, str(first + i)))
            yield i, absolute(address, beside) if asked else None

    for i, fetched in Fetcher(settings.fetch, settings.max_bytes).fetch_all(wanted()):
        error = fetched.error if addresses[i] else null
        row = Row(name, str(first + i), None, fetched.read(), error)
        yield row._replace(kept=kept.slice(i, 1))


def kept_columns(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """The columns in `schema`, in its types; nulls where the file does not have one."""
    columns = [
        batch.column(wanted.name).cast(wanted.type)
        if wanted.name in batch.schema.names
        else pa.nulls(batch.num_rows, wanted.type)
        for wanted in schema
    ]
    return pa.table(columns, schema)


def _image(value: Any, name: str, settings: ReadSettings) -> bytes:
    """The bytes of one value of the image column. Raises RowError."""
    path = None
    if t.is_struct(value.type) and value.is_valid:
        path = value["path"].as_py() if value.type.get_field_index("path") >= 0 else None
        value = value["bytes"]
    if value.is_valid and not t.is_struct(value.type):
        data = value.as_buffer()
        check_size(data.size, settings.max_bytes)
        return data.to_pybytes()
    if not path:
        raise RowError(Reason.MISSING_IMAGE, "null in the image column")
    return read_file(settings, _beside(name, str(path)))


def _beside(name: str, path: str) -> str:
    """A path that a row gives, from its file's folder. Raises RowError when it leaves the source:
    what is in a dataset must not decide which other files of this machine are read.
    """
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
    if target.startswith(("/", "../")) or target == ".." or "://" in path:
        raise row_error(
            Reason.MISSING_IMAGE, f"no bytes, and its path leads out of the source: {path}"
        )
    return target
