"""The rows of some addresses of a list: what is there, fetched several at once, in their order."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.fetch.fetch import Fetched, Fetcher, absolute
from pipeline.formats.documents import rows_within
from pipeline.formats.row import ReadSettings, Row, row_error
from pipeline.lists import AddressList, Group, address_of, is_one_row, storable
from pipeline.plan import row_id
from pipeline.render.renderer import Renderer
from pipeline.storage import PatientFile
from schemas.errors import Reason, RowError
from schemas.ledger import Unit


def list_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    """A row for each address, or one for each page of what turns out to be a document. The list
    itself is read again only for columns to keep.
    """
    kept = _kept(unit, settings)
    with Renderer(settings.pages) as renderer:
        for place, fetched in fetched_addresses(unit, settings):
            for row in _rows(unit, unit.names[place + 1], fetched, settings, renderer):
                yield row._replace(kept=kept and kept.slice(place, 1))


def fetched_addresses(unit: Unit, settings: ReadSettings) -> Iterator[tuple[int, Fetched]]:
    """(place, what is there) of each row of the list that is wanted; in a retry without the others.

    Raises nothing: where there is no address, that is an error as any other.
    """
    name, *members = unit.names
    beside = settings.source.full_address(name)

    def wanted() -> Iterator[tuple[int, str | None]]:
        for place, member in enumerate(members):
            if member and (unit.rows is None or unit.wants(row_id(name, member))):
                address = address_of(member)
                yield place, address and absolute(address, beside)

    for place, fetched in Fetcher(settings.fetch, settings.max_bytes).fetch_all(wanted()):
        yield place, fetched if address_of(members[place]) else Fetched(error=_no_address())


def _no_address() -> RowError:
    return row_error(Reason.BAD_ADDRESS, "this line of the list holds no address")


def _rows(
    unit: Unit, member: str, fetched: Fetched, settings: ReadSettings, renderer: Renderer
) -> Iterator[Row]:
    row = Row(unit.names[0], member)
    if fetched.file is None:
        yield row._replace(error=fetched.error)
        return
    with fetched.file as file:
        if is_one_row(member):  # so it was planned
            yield row._replace(data=file.read())
        else:
            yield from rows_within(unit, row, file, settings, renderer)


def _kept(unit: Unit, settings: ReadSettings) -> pa.Table | None:
    """The columns to keep, as text; null where the list does not have them (any more)."""
    columns = settings.kept.names
    if not columns:
        return None
    name, *members = unit.names
    try:
        with PatientFile(settings.source.fs, settings.source.path(name)) as file:
            addresses = AddressList(file, name, settings.uri_column)
            values = addresses.values(Group(unit.first_row, tuple(members)))
    except Exception:  # the list is gone or broken now, which does not hurt what it led to
        values = [{}] * len(members)
    texts = {column: [_text(row.get(column)) for row in values] for column in columns}
    return pa.table(texts, settings.kept)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return storable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
