"""What is written under OUT/_vl01: the plan's units and growths, the record of a committed unit."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import pyarrow as pa

from schemas.errors import LedgerError


class UnitKind(StrEnum):
    IMAGES = "images"  # some of the image files of a folder
    TAR = "tar"  # one WebDataset shard; a row for each page of the documents in it
    DOCUMENTS = "documents"  # some PDFs and TIFFs; a row for each page
    PARQUET = "parquet"  # consecutive rows of one Parquet file; pages likewise
    LIST = "list"  # consecutive addresses of one list


@dataclass(frozen=True)
class Unit:
    """The slice of a source that is read, retried and committed as a whole.

    names: relative to the source's root; many for IMAGES and DOCUMENTS, one otherwise. For LIST the
    members of its rows follow the name of the list, empty for those that a retry leaves alone. For
    TAR and PARQUET the members that a retry is for follow the name of the file.
    first_row, rows: of the Parquet file, one of which may hold a document of many pages; rows is
    the count of names for IMAGES, of members for LIST, whose first_row is the offset of the first
    of them in bytes. rows is None where only reading tells: for a tar, for documents and what may
    be some, and for a Parquet file that could not be planned (damaged, no image column, no rows),
    which is read again as a whole and, if it still cannot be, is one row.
    only, but: row ids, in a retry: the rows to do again, and the rows to leave as they are.
    """

    number: int
    kind: UnitKind
    names: tuple[str, ...]
    first_row: int = 0
    rows: int | None = None
    only: frozenset[str] | None = None
    but: frozenset[str] = frozenset()

    @property
    def files(self) -> tuple[str, ...]:
        """Those of the names that are names of files of the source."""
        return self.names[:1] if self.kind in _OF_ONE_FILE else self.names

    @property
    def members(self) -> frozenset[str] | None:
        """Those of a tar or of a Parquet file that a retry is for; None: all of them."""
        return frozenset(self.names[1:]) or None

    @property
    def items(self) -> list[tuple[str, str | None]]:
        """Name and member of what is opened by itself, as far as the plan knows it: each file,
        each address of a list, each member that a retry is for."""
        if self.kind in _OF_ONE_FILE and len(self.names) > 1:
            return [(self.names[0], member) for member in self.names[1:] if member]
        return [(name, None) for name in self.names]

    @property
    def may_hold_documents(self) -> bool:
        """Whether there may be a row for each page of something: only reading tells."""
        return self.rows is None or self.kind is UnitKind.PARQUET

    def narrowed(self, members: Collection[str | None]) -> "Unit":
        """Of a list, a tar or a Parquet file, no more than the rows of these members: the others
        are then not even fetched or opened. An id alone does not tell of what it is a page. Any
        other unit as it is, and one whose file itself is a row to do again (None)."""
        name, *mine = self.names
        if self.kind is UnitKind.LIST:
            return replace(self, names=(name, *(one if one in members else "" for one in mine)))
        if self.kind in _OF_ONE_FILE and None not in members:
            return replace(self, names=(name, *sorted(filter(None, members))))
        return self

    def wants(self, row_id: str) -> bool:
        return (self.only is None or row_id in self.only) and row_id not in self.but


_OF_ONE_FILE = (UnitKind.TAR, UnitKind.PARQUET, UnitKind.LIST)

PLAN = pa.schema(
    [
        ("unit", pa.int64()),
        ("kind", pa.string()),
        ("names", pa.list_(pa.string())),
        ("first_row", pa.int64()),
        ("rows", pa.int64()),
    ]
)


# What the source held when it was listed last. state: a digest of a file's size and stamp.
FILES = pa.schema([("name", pa.string()), ("state", pa.int64())])

# Of a retry: the rows of the planned units that are done again.
RETRY_PLAN = pa.schema([*PLAN, ("only", pa.list_(pa.string())), ("but", pa.list_(pa.string()))])


@dataclass(frozen=True)
class PlanTotals:
    """rows: of the units that could be counted; the others are read to be counted."""

    units: int
    rows: int
    uncounted_units: int


@dataclass(frozen=True)
class Growth:
    """What a source that grows had become when it was listed again.

    number: 1 for the first; 0 stands for the plan before. totals: of the plan with it. settled:
    changes up to this growth were all done when it was found. Files that are gone keep their rows;
    waiting ones were written too recently to be whole for sure, and are left for the next time.
    """

    number: int
    totals: PlanTotals
    settled: int = 0
    new_files: int = 0
    changed_files: int = 0
    gone_files: int = 0
    waiting_files: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: str | bytes) -> "Growth":
        values: dict[str, Any] = json.loads(data)
        values["totals"] = PlanTotals(**values["totals"])
        return cls(**values)


@dataclass(frozen=True)
class Work:
    """The rows of a unit that one run did, by what came out, and when it committed them."""

    run: str
    at: str
    statuses: dict[str, int]
    reasons: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    tiles: int = 0

    @property
    def rows(self) -> int:
        return sum(self.statuses.values())


@dataclass(frozen=True)
class CommitRecord:
    """Proof that a unit is done: its part counts if, and only if, this record is there.

    statuses and reasons count the part's rows; tokens sums prompt and output tokens. growth: the
    newest growth of the plan that the part knows. works: of every run that put rows there; empty
    when there was only one, which the record itself tells of.
    """

    unit: int
    part: str
    rows: int
    size: int  # of the part, in bytes
    sha256: str
    statuses: dict[str, int]
    reasons: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    output_tokens: int = 0
    run: str = ""
    committed_at: str = ""
    tiles: int = 0
    growth: int = 0
    works: tuple[Work, ...] = ()

    def history(self) -> tuple[Work, ...]:
        """What each run did for this unit, the first one first."""
        only = Work(
            self.run,
            self.committed_at,
            self.statuses,
            self.reasons,
            self.prompt_tokens,
            self.output_tokens,
            self.tiles,
        )
        return self.works or (only,)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "CommitRecord":
        """Raises LedgerError, naming `where`, for a damaged record or one of another version."""
        try:
            values: dict[str, Any] = json.loads(data)
            values["works"] = tuple(Work(**work) for work in values.get("works", ()))
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{where} is not a commit record: {error}") from error
