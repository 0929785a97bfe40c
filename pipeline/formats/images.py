"""The rows of a unit of image files: one for each."""

from collections.abc import Iterator

from pipeline.formats.row import ReadSettings, Row, read_file, read_row
from schemas.ledger import Unit


def image_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    for name in unit.names:
        yield read_row(unit, name, None, lambda name=name: read_file(settings, name))
