"""The rows of some addresses of a list: what is there, fetched several at once, in their order."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.fetch.fetch import Fetched, Fetcher, absolute
from pipeline.formats.row import ReadSettings, Row, row_error
from pipeline.lists import AddressList, Group, address_of
from pipeline.plan import row_id
from pipeline.storage import PatientFile
from schemas.errors import Reason
from schemas.ledger import Unit

_NO_ADDRESS = Fetched(error=row_error(Reason.BAD_ADDRESS, "this line of the list holds no address"))


def list_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    """A row for each address; the list itself is read again only for columns to keep."""
    name, *members = unit.names
    beside = settings.source.full_address(name)
    kept = _kept(unit, settings)

    def wanted() -> Iterator[tuple[int, str | None]]:
        for place, member in enumerate(members):
            address = address_of(member) if unit.wants(row_id(name, member)) else None
            yield place, address and absolute(address, beside)

    for place, fetched in Fetcher(settings.fetch, settings.max_bytes).fetch_all(wanted()):
        member = members[place]
        if address_of(member) is None:
            fetched = _NO_ADDRESS
        yield Row(name, member, None, *fetched, kept=kept and kept.slice(place, 1))


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
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
