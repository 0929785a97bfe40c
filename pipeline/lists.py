"""Lists of addresses: .txt (one a line), .csv and .jsonl (in one of their columns).

Finds the addresses and names their rows; fetches nothing.
"""

import csv
import json
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from pipeline.sources import kind_of
from pipeline.storage import PatientFile
from schemas.errors import ConfigError
from schemas.ledger import UnitKind

USUAL_COLUMNS = ("uri", "url", "path", "address")
_BLOCK_BYTES = 4 * 1024**2
_LONGEST_LINE = 1024**2
csv.field_size_limit(_LONGEST_LINE)  # else a field may be only an eighth of a line
_LONGEST_ADDRESS = 8192  # characters; what is longer is none
_NUMBERED = re.compile(r"#\d+$")
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


class Record(NamedTuple):
    """A line of a list, or what of a CSV file makes one row.

    offset: of its first byte. line: the number of that line, from 1. address: None where it holds
    none. values: by column; there are none in a .txt.
    """

    offset: int
    line: int
    address: str | None
    values: dict[str, Any]


class Group(NamedTuple):
    """Consecutive rows of a list. offset: of the first one's record."""

    offset: int
    members: tuple[str, ...]


def address_of(member: str) -> str | None:
    """The address that a row is named after; None for a row of a record without one."""
    return None if member.startswith("#") else _NUMBERED.sub("", member, count=1)


def is_one_row(member: str) -> bool:
    """Whether what is at the address is read as one image by its name, or there is none: anything
    else may turn out to be a document."""
    address = address_of(member)
    return address is None or kind_of(re.split("[?#]", address, maxsplit=1)[0]) is UnitKind.IMAGES


def storable(text: str) -> str:
    """A text that Arrow can hold: JSON may escape half a character, as of an emoji that was cut."""
    return text.encode("utf-8", "backslashreplace").decode()


def choose_column(columns: Collection[str], wanted: str | None) -> str | None:
    """The column `wanted`; if none is, the only one with a usual name. None if there is none."""
    if wanted is not None:
        return wanted if wanted in columns else None
    usual = [column for column in columns if column.strip().lower() in USUAL_COLUMNS]
    return usual[0] if len(usual) == 1 else None


def no_column(columns: Collection[str], wanted: str | None) -> str:
    """Why `choose_column` gave None, for a user."""
    if wanted:
        return f"no column {wanted!r} (--uri-column) among {', '.join(columns)}"
    *usual, last = USUAL_COLUMNS
    return (
        f"one column called {', '.join(usual)} or {last} was expected among {', '.join(columns)};"
        " --uri-column names another"
    )


class AddressList:
    """An open list, to be gone through as often as needed.

    Its methods raise ConfigError, which names the list, when it is none.
    """

    def __init__(
        self,
        file: PatientFile,
        address: str,
        uri_column: str | None = None,
        keep: tuple[str, ...] = (),
    ) -> None:
        """address: of the list; its ending says what kind it is. keep: columns of interest."""
        self._file = file
        self._address = address
        self._kind = address.rpartition(".")[2].lower()
        self._uri_column = uri_column
        self._keep = keep
        self.kept: set[str] = set()  # of the columns of interest, those that `groups` came across

    def groups(self, rows: int) -> Iterator[Group]:
        """All rows, so many at a time.

        A row's member is its address. One that comes again gets `#2`, `#3`; one that itself ends
        like that gets its number too, so that `address_of` knows which it is. A record without an
        address is named after its line. So lines that are appended rename no other row.

        Reads the list twice. Memory: 8 bytes a record, and those that are repeated.
        """
        repeated = self._repeated()
        seen: Counter[str] = Counter()
        records = self._records()
        while group := list(islice(records, rows)):
            members = tuple(_member(record, repeated, seen) for record in group)
            yield Group(group[0].offset, members)

    def new(self, known: Collection[str], rows: int) -> Iterator[Group]:
        """The rows with other members than the known ones, at most so many at a time."""
        offset, members = 0, []
        for group in self.groups(1):
            is_new = group.members[0] not in known
            if members and (not is_new or len(members) == rows):
                yield Group(offset, tuple(members))
                members = []
            if is_new:
                offset = offset if members else group.offset
                members += group.members
        if members:
            yield Group(offset, tuple(members))

    def values(self, group: Group) -> list[dict[str, Any]]:
        """By column, for each row of a group. Where lines were moved since, the whole list is gone
        through; a row that is in it no more, or whose line never had an address, has none then."""
        found = list(islice(self._records(group.offset), len(group.members)))
        addresses = [address_of(member) for member in group.members]
        if [record.address for record in found] == addresses:
            return [record.values for record in found]
        moved = self._values_by_member(group.members)
        return [moved.get(member, {}) for member in group.members]

    def _values_by_member(self, members: Collection[str]) -> dict[str, dict[str, Any]]:
        """Of those that have an address: the others are called after the line they had."""
        wanted = {member for member in members if address_of(member) is not None}
        repeated = self._repeated()
        seen: Counter[str] = Counter()
        named = ((_member(record, repeated, seen), record) for record in self._records())
        return {member: record.values for member, record in named if member in wanted}

    def _repeated(self) -> set[int]:
        """The hashes of the addresses that come more than once."""
        hashes, records = array("q"), 0
        for record in self._records():
            records += 1
            if record.address is not None:
                hashes.append(hash(record.address))
            self.kept.update(name for name in self._keep if name in record.values)
        if records and not hashes:
            column = f" under {self._uri_column!r}" if self._uri_column else ""
            raise ConfigError(f"{self._address} holds no address{column} in {records:,} lines")
        if not hashes:
            return set()
        sorted_hashes = np.frombuffer(hashes, np.int64)
        sorted_hashes.sort()
        return set(np.unique(sorted_hashes[1:][sorted_hashes[1:] == sorted_hashes[:-1]]).tolist())

    def _records(self, offset: int = 0) -> Iterator[Record]:
        """From the record at an offset on; line numbers then count from there."""
        lines = _Lines(self._file, self._address)
        if self._kind == "csv":
            return self._csv_records(lines, offset)
        if self._kind == "jsonl":
            return self._json_records(lines, offset)
        lines.seek(offset)
        return _text_records(lines)

    def _csv_records(self, lines: "_Lines", offset: int) -> Iterator[Record]:
        reader = csv.reader(lines, strict=True)  # else an open quote swallows what follows it
        try:
            header = next(filter(None, reader), [])  # a blank line is none, as among the records
            if not header:
                return
            if (column := choose_column(header, self._uri_column)) is None:
                raise ConfigError(f"{self._address}: {no_column(header, self._uri_column)}")
            lines.seek(max(offset, lines.offset))
            start = lines.offset, lines.number + 1
            for fields in reader:
                if fields:
                    values = dict(zip(header, fields, strict=False))
                    yield Record(*start, _usable(values.get(column)), values)
                start = lines.offset, lines.number + 1
        except csv.Error as error:
            raise ConfigError(f"{self._address}, line {lines.number}: {error}") from error

    def _json_records(self, lines: "_Lines", offset: int) -> Iterator[Record]:
        column = self._uri_column or self._column_of_first_line()
        lines.seek(offset)
        start = lines.offset
        for line in lines:
            if not line.isspace():
                values = _parse(line)
                address = values.get(column) if column else None
                yield Record(start, lines.number, _usable(address), values)
            start = lines.offset

    def _column_of_first_line(self) -> str | None:
        """Of a .jsonl, wherever it is read from: lines further on may have others too. None where
        no line is an object."""
        lines = _Lines(self._file, self._address)
        for line in lines:
            if values := _parse(line):
                if (column := choose_column(values, None)) is None:
                    where = f"{self._address}, line {lines.number}"
                    raise ConfigError(f"{where}: {no_column(values, None)}")
                return column
        return None


def _text_records(lines: "_Lines") -> Iterator[Record]:
    start = lines.offset
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            yield Record(start, lines.number, _usable(text), {})
        start = lines.offset


def _parse(line: str) -> dict[str, Any]:
    """Empty for what is no JSON object: its row will say so."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _usable(address: Any) -> str | None:
    if not isinstance(address, str):
        return None
    address = storable(address.strip())
    if not address or address.startswith("#") or len(address) > _LONGEST_ADDRESS:
        return None
    return address


def _member(record: Record, repeated: set[int], seen: Counter[str]) -> str:
    if record.address is None:
        return f"#line {record.line}"
    number = 1
    if hash(record.address) in repeated:
        seen[record.address] += 1
        number = seen[record.address]
    if number == 1 and not _NUMBERED.search(record.address):
        return record.address
    return f"{record.address}#{number}"


class _Lines:
    """The lines of a file, in blocks. offset: of the next line; number: of the last one."""

    def __init__(self, file: PatientFile, address: str) -> None:
        self._file = file
        self._address = address
        self.number = 0
        self.seek(0)

    def seek(self, offset: int) -> None:
        self._file.seek(offset)
        self.offset = offset
        self._block, self._start = b"", 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        end = self._block.find(b"\n", self._start) + 1
        while not end:
            rest = self._block[self._start :]
            more = self._read() if len(rest) <= _LONGEST_LINE else b""
            self._block, self._start = rest + more, 0
            end = self._block.find(b"\n") + 1 if more else len(rest)
            if not (more or rest):
                raise StopIteration
        line = self._block[self._start : end]
        self._start = end
        self.number += 1
        return self._text(line)

    def _read(self) -> bytes:
        try:
            return self._file.read(_BLOCK_BYTES)
        except Exception as error:  # storage clients raise far more than OSError
            raise ConfigError(f"cannot read {self._address}: {error}") from error

    def _text(self, line: bytes) -> str:
        if len(line) > _LONGEST_LINE:
            raise ConfigError(
                f"{self._address}, line {self.number}: longer than a megabyte; expected a list of"
                " addresses"
            )
        if self.offset == 0 and line.startswith(_UTF16_MARKS):
            raise ConfigError(f"{self._address} is text in UTF-16; expected UTF-8")
        self.offset += len(line)
        return line.removeprefix(_UTF8_MARK).decode("utf-8", "backslashreplace")
