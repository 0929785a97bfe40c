"""The slices that sources are cut into: documents in groups, lists by addresses, Parquet at row
groups. Opens nothing.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.listing import SourceFile
from pipeline.lists import Group, is_one_row
from schemas.ledger import UnitKind

# Of a unit of documents: they share the start of a renderer, and wait for each other.
_DOCUMENTS = 8
_DOCUMENT_BYTES = 1024**2  # of print a few hundred pages, of scans a few
_LARGE_AHEAD = 4096


class Slice(NamedTuple):
    """A unit that has no number yet."""

    kind: UnitKind
    names: tuple[str, ...]
    first_row: int = 0
    rows: int | None = None


class Documents:
    """Groups documents into units. A large one is alone in its unit, and comes late: what takes
    long, it or its pages, is then not in the way of the others.
    """

    def __init__(self) -> None:
        self._small: list[SourceFile] = []
        self._large: list[str] = []

    def add(self, file: SourceFile) -> Iterator[Slice]:
        size = file.size or 0
        if size > _DOCUMENT_BYTES:
            self._large.append(file.name)
            if len(self._large) == _LARGE_AHEAD:
                yield from self._take_large()
            return
        if sum(small.size or 0 for small in self._small) + size > _DOCUMENT_BYTES:
            yield from self._take_small()
        self._small.append(file)
        if len(self._small) == _DOCUMENTS:
            yield from self._take_small()

    def rest(self) -> Iterator[Slice]:
        yield from self._take_small()
        yield from self._take_large()

    def _take_small(self) -> Iterator[Slice]:
        if self._small:
            yield Slice(UnitKind.DOCUMENTS, tuple(file.name for file in self._small))
        self._small = []

    def _take_large(self) -> Iterator[Slice]:
        yield from (Slice(UnitKind.DOCUMENTS, (name,)) for name in self._large)
        self._large = []


def list_slice(name: str, group: Group) -> Slice:
    rows = len(group.members) if all(map(is_one_row, group.members)) else None
    return Slice(UnitKind.LIST, (name, *group.members), group.offset, rows)


def cut(group_rows: list[int], unit_rows: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of units of about `unit_rows` rows, cut between row groups only.

    A row group is never cut: to read its second half, its first has to be read and dropped.
    """
    first, rows = 0, 0
    for group in group_rows:
        if rows and rows + group > unit_rows * 3 // 2:
            yield first, rows
            first, rows = first + rows, 0
        rows += group
        if rows >= unit_rows:
            yield first, rows
            first, rows = first + rows, 0
    if rows:
        yield first, rows


def beyond(group_rows: list[int], row: int) -> list[int]:
    """The row groups from a row on; the one it lies in is cut."""
    left = []
    for rows in group_rows:
        left.append(rows - min(rows, row))
        row -= min(rows, row)
    return left
