"""Reads units into INPUT rows, a few at a time. Bad input becomes rows; nothing raises for it.

Does not look into images: their bytes are passed on as they are. Pages of documents are rendered.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from pipeline.fetch.hosts import Hosts
from pipeline.fetch.settings import FetchSettings
from pipeline.formats.documents import document_rows
from pipeline.formats.images import image_rows
from pipeline.formats.lists import list_rows
from pipeline.formats.parquet import parquet_rows
from pipeline.formats.row import TABLE_BYTES, TABLE_ROWS, ReadSettings, Row, row_error
from pipeline.formats.tar import tar_rows
from pipeline.plan import ids_digest, units_of
from pipeline.render.settings import PageSettings
from pipeline.sources import Source
from schemas.errors import Reason
from schemas.job import Job
from schemas.ledger import Unit, UnitKind
from schemas.rows import INPUT, with_kept

__all__ = ["ReadSettings", "quickly", "read_settings", "read_unit", "read_units"]

_LOOK_SECONDS = 10.0
_ROWS = {
    UnitKind.IMAGES: image_rows,
    UnitKind.DOCUMENTS: document_rows,
    UnitKind.TAR: tar_rows,
    UnitKind.PARQUET: parquet_rows,
    UnitKind.LIST: list_rows,
}


def read_settings(job: Job, source: Source, pages: PageSettings) -> ReadSettings:
    """What a job says of reading, but for the columns to keep. Raises ConfigError."""
    Hosts(job.allow_host)  # else each read task would find the mistake, after the model is loaded
    fetch = FetchSettings(
        job.allow_host, job.fetch_seconds, job.host_requests, job.host_rate, job.endpoint_url
    )
    return ReadSettings(
        source,
        job.max_bytes,
        job.image_column,
        pages=pages,
        uri_column=job.uri_column,
        fetch=fetch,
    )


def quickly(settings: ReadSettings) -> ReadSettings:
    """For a look at some rows, which can do without those of a slow server."""
    seconds = min(settings.fetch.seconds, _LOOK_SECONDS)
    return replace(settings, fetch=replace(settings.fetch, seconds=seconds))


def read_units(units: pa.Table, settings: ReadSettings) -> Iterator[pa.Table]:
    """INPUT rows, and the kept columns, of units given in the PLAN schema."""
    for unit in units_of(units):
        yield from read_unit(unit, settings)


def read_unit(unit: Unit, settings: ReadSettings) -> Iterator[pa.Table]:
    """INPUT rows, and the kept columns, of one unit: at least one row, in small tables.

    A table has at most TABLE_ROWS rows and TABLE_BYTES of data, or one larger image. The unit's
    last row tells how many rows it has, and which: where the worker dies, Ray reads the unit again
    for the tables that are still to come, and may meet other rows then.
    """
    rows: list[tuple[Row, float]] = []
    ids: list[str] = []
    size = 0
    for row, seconds in _timed(_wanted_rows(unit, settings)):
        more = len(row.data or b"")
        if rows and (len(rows) == TABLE_ROWS or size + more > TABLE_BYTES):
            yield _table(rows, unit, ids, False, settings)
            rows, size = [], 0
        rows.append((row, seconds))
        ids.append(row.id)
        size += more
    yield _table(rows, unit, ids, True, settings)


def _wanted_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    """All rows of a unit, or in a retry those that are done again."""
    none = True
    for row in _ROWS[unit.kind](unit, settings):
        if unit.wants(row.id):
            yield row
            none = False
    if none:
        error = row_error(Reason.EMPTY_SOURCE, "the row that was asked for is not in it any more")
        yield Row(*unit.items[0], error=error)


def _timed(rows: Iterator[Row]) -> Iterator[tuple[Row, float]]:
    while True:
        began = time.perf_counter()
        row = next(rows, None)
        if row is None:
            return
        yield row, time.perf_counter() - began


def _table(
    timed: list[tuple[Row, float]],
    unit: Unit,
    ids: list[str],
    last: bool,
    settings: ReadSettings,
) -> pa.Table:
    """ids: of all rows of the unit as far as these."""
    rows = [row for row, _ in timed]
    count = len(rows)
    values = {
        "row_id": ids[-count:],
        "unit": [unit.number] * count,
        "index": range(len(ids) - count, len(ids)),
        "unit_rows": [None] * (count - 1) + [len(ids) if last else None],
        "unit_digest": [None] * (count - 1) + [ids_digest(ids) if last else None],
        "source": [settings.source.full_address(row.name) for row in rows],
        "member": [row.member for row in rows],
        "page": [row.page for row in rows],
        "reason": [row.error and row.error.reason.value for row in rows],
        "message": [row.error and row.error.message for row in rows],
        "read_seconds": [seconds for _, seconds in timed],
        "data": [row.data for row in rows],
    }
    columns = [pa.array(values[column.name], column.type) for column in INPUT]
    nothing = pa.table([pa.nulls(1, column.type) for column in settings.kept], settings.kept)
    kept = pa.concat_tables([row.kept or nothing for row in rows])
    return pa.table([*columns, *kept.columns], with_kept(INPUT, settings.kept))
