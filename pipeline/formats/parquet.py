"""The rows of a slice of a Parquet file: its images as they are, the pages of documents, and the
columns that are kept.
"""

import io
import posixpath
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as t

from pipeline.columns import find_column, no_column
from pipeline.fetch.fetch import Fetcher, absolute
from pipeline.formats.documents import rows_within
from pipeline.formats.row import (
    STREAM_BYTES,
    TABLE_BYTES,
    TABLE_ROWS,
    ReadSettings,
    Row,
    blame,
    check_size,
    read_file,
    row_error,
)
from pipeline.render.renderer import Renderer
from pipeline.storage import PatientFile
from schemas.errors import Reason, RowError
from schemas.ledger import Unit

_MOST_ADDRESSES = 256  # read at a time, so that many of them can be fetched at once


class Cell(NamedTuple):
    """One row of the file. image: what its image column holds, or its address leads to, in a file
    at its start, which is the caller's to close; None where the row has an error."""

    row: Row
    image: IO[bytes] | None = None


def parquet_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    """A row for each cell, or one for each page of what turns out to be a document."""
    with Renderer(settings.pages) as renderer:
        for row, image in cells(unit, settings):
            if image is None:
                yield row
                continue
            with image:
                for found in rows_within(unit, row, image, settings, renderer):
                    yield found._replace(kept=row.kept)


def cells(unit: Unit, settings: ReadSettings) -> Iterator[Cell]:
    """Exactly those that were planned: what cannot be read any more has an error. In a retry only
    those it is for.

    A file that had no rows to plan gives those it turns out to have, or one with an error.
    """
    name, wanted = unit.files[0], unit.members
    row, error = unit.first_row, None
    end = None if unit.rows is None else unit.first_row + unit.rows
    try:
        for found in _cells_of_file(unit, row, end, settings):
            if found is not None:
                yield found
            row += 1
    except RowError as caught:
        error = caught
    if end is not None:
        changed = row_error(Reason.SOURCE_DAMAGED, f"it has only {row:,} rows now; it was changed")
        for missing in map(str, range(row, end)):
            if wanted is None or missing in wanted:
                yield Cell(Row(name, missing, error=error or changed))
    elif error or row == 0:
        error = error or row_error(Reason.EMPTY_SOURCE, "it holds no rows")
        yield Cell(Row(name, None, error=error))


def _cells_of_file(
    unit: Unit, first: int, end: int | None, settings: ReadSettings
) -> Iterator[Cell | None]:
    """Rows first to end, as far as they can be read; then raises RowError. None: not wanted."""
    name = unit.files[0]
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
            cells_of, most_rows = _cells_of_batch, TABLE_ROWS
            if settings.uri_column is not None:
                cells_of, most_rows = _cells_by_address, _MOST_ADDRESSES
            for row, batch in _batches(parquet, list(columns), first, end, most_rows):
                yield from cells_of(unit, row, batch, column, settings)
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
        done = start + group.num_rows <= first or (end is not None and start >= end)
        if done or group.num_rows == 0:
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


def _cells_of_batch(
    unit: Unit, first: int, batch: pa.RecordBatch, column: str, settings: ReadSettings
) -> Iterator[Cell | None]:
    name, wanted = unit.files[0], unit.members
    images = batch.column(column)
    kept = kept_columns(batch, settings.kept)
    for i in range(batch.num_rows):
        row = Row(name, str(first + i), kept=kept.slice(i, 1))
        if wanted is not None and row.member not in wanted:
            yield None
            continue
        try:
            yield Cell(row, io.BytesIO(_image(images[i], name, settings)))
        except RowError as error:
            yield Cell(row._replace(error=error))


def _cells_by_address(
    unit: Unit, first: int, batch: pa.RecordBatch, column: str, settings: ReadSettings
) -> Iterator[Cell | None]:
    name, wanted = unit.files[0], unit.members
    addresses = [_text(value).strip() for value in batch.column(column)]
    kept = kept_columns(batch, settings.kept)
    beside = settings.source.full_address(name)
    null = row_error(Reason.MISSING_IMAGE, "no address in its column")

    def is_wanted(i: int) -> bool:
        return wanted is None or str(first + i) in wanted

    def asked() -> Iterator[tuple[int, str | None]]:
        for i, address in enumerate(addresses):
            yield i, absolute(address, beside) if address and is_wanted(i) else None

    for i, fetched in Fetcher(settings.fetch, settings.max_bytes).fetch_all(asked()):
        row = Row(name, str(first + i), kept=kept.slice(i, 1))
        error = fetched.error if addresses[i] else null
        yield Cell(row._replace(error=error), fetched.file) if is_wanted(i) else None


def _text(value: Any) -> str:
    """Of one value of a column of strings, empty for null. Arrow trusts a file that they are UTF-8,
    and some are not."""
    data = value.cast(pa.large_string()).cast(pa.large_binary()).as_py()
    return (data or b"").decode("utf-8", "backslashreplace")


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
        path = value["path"] if value.type.get_field_index("path") >= 0 else None
        value = value["bytes"]
    if value.is_valid and not t.is_struct(value.type):
        data = value.as_buffer()
        check_size(data.size, settings.max_bytes)
        return data.to_pybytes()
    if path is None or not _text(path):
        raise RowError(Reason.MISSING_IMAGE, "null in the image column")
    return read_file(settings, _beside(name, _text(path)))


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
