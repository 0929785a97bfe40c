"""What is written under OUT/_vl01: the plan's units and the record of a committed unit."""

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

from schemas.errors import LedgerError


class UnitKind(StrEnum):
    IMAGES = "images"  # some of the image files of a folder
    TAR = "tar"  # one WebDataset shard
    DOCUMENTS = "documents"  # some PDFs and TIFFs; a row for each page
    PARQUET = "parquet"  # consecutive rows of one Parquet file
    LIST = "list"  # consecutive addresses of one list


@dataclass(frozen=True)
class Unit:
    """The slice of a source that is read, retried and committed as a whole.

    names: relative to the source's root; many for IMAGES and DOCUMENTS, one otherwise. For LIST the
    members of its rows follow the name of the list.
    first_row, rows: of the Parquet file; rows is the count of names for IMAGES, of members for
    LIST, whose first_row is the offset of the first of them in bytes. rows is None where only
    reading tells: for a tar, for documents, and for a Parquet file that could not be planned
    (damaged, no image column, no rows), which is read again as a whole and, if it still cannot be,
    is one row.
    only, but: row ids, in a retry: the rows to do again, and the rows to leave as they are.
    """

    number: int
    kind: UnitKind
    names: tuple[str, ...]
    first_row: int = 0
    rows: int | None = None
    only: frozenset[str] | None = None
    but: frozenset[str] = frozenset()

    def wants(self, row_id: str) -> bool:
        return (self.only is None or row_id in self.only) and row_id not in self.but


PLAN = pa.schema(
    [
        ("unit", pa.int64()),
        ("kind", pa.string()),
        ("names", pa.list_(pa.string())),
        ("first_row", pa.int64()),
        ("rows", pa.int64()),
    ]
)


# Of a retry: the rows of the planned units that are done again.
RETRY_PLAN = pa.schema([*PLAN, ("only", pa.list_(pa.string())), ("but", pa.list_(pa.string()))])


@dataclass(frozen=True)
class CommitRecord:
    """Proof that a unit is done: its part counts if, and only if, this record is there.

    statuses and reasons count the part's rows; tokens sums prompt and output tokens.
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

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "CommitRecord":
        """Raises LedgerError, naming `where`, for a damaged record or one of another version."""
        try:
            values: dict[str, Any] = json.loads(data)
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{where} is not a commit record: {error}") from error
