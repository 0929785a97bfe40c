"""What reading one row gives, and which reason an error is. Knows no file format."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.fetch.settings import FetchSettings
from pipeline.listing import as_text
from pipeline.plan import row_id
from pipeline.render.settings import PageSettings
from pipeline.sources import Source
from pipeline.storage import PatientFile, patiently
from schemas.errors import Reason, RowError
from schemas.ledger import Unit

STREAM_BYTES = 8 * 1024**2  # of a large file, asked for at once
TABLE_ROWS = 16
TABLE_BYTES = 64 * 1024**2

_LONGEST_MESSAGE = 500
_GONE = "not there (any more), a link to nothing, or its name is not UTF-8"


@dataclass(frozen=True)
class ReadSettings:
    """What reading needs to know beside the unit. Picklable.

    max_bytes: a larger file becomes a failed row. kept: the schema of the columns carried over.
    pages: how documents are rendered. uri_column: of a list, or of a Parquet file, whose images are
    then at those addresses.
    """

    source: Source
    max_bytes: int
    image_column: str | None = None
    kept: pa.Schema = field(default_factory=lambda: pa.schema([]))
    pages: PageSettings = field(default_factory=PageSettings)
    uri_column: str | None = None
    fetch: FetchSettings = field(default_factory=FetchSettings)


class Row(NamedTuple):
    """A row before it has its place in the unit. page: from 1, of a document. `data` or `error`, or
    neither where the unit does not want it; kept: one row, if any."""

    name: str
    member: str | None
    page: int | None = None
    data: bytes | None = None
    error: RowError | None = None
    kept: pa.Table | None = None

    @property
    def id(self) -> str:
        return row_id(self.name, self.member, self.page)


def read_row(
    unit: Unit, name: str, member: str | None, read: Callable[[], bytes], page: int | None = None
) -> Row:
    """The row that `read` has the bytes of, or the RowError it raises."""
    row = Row(name, member, page)
    if not unit.wants(row.id):
        return row
    try:
        return row._replace(data=read())
    except RowError as error:
        return row._replace(error=error)


def read_file(settings: ReadSettings, name: str) -> bytes:
    """A whole file, no larger than allowed. Raises RowError."""
    fs, path = settings.source.fs, settings.source.path(name)
    try:
        size = patiently(lambda: fs.info(path)["size"])
        check_size(size, settings.max_bytes)
        # With its end given s3fs asks for the bytes at once, not for the size again.
        data: Any = patiently(lambda: fs.cat_file(path, start=0, end=size)) if size else b""
        return data
    except RowError:
        raise
    except FileNotFoundError as error:
        raise row_error(Reason.NOT_FOUND, f"{_GONE}: {path}") from error
    except Exception as error:  # storage clients raise far more than OSError
        raise row_error(Reason.READ_ERROR, error) from error


def check_size(size: int, max_bytes: int) -> None:
    """Raises RowError. To be called before the bytes are read."""
    if size > max_bytes:
        raise RowError(
            Reason.TOO_MANY_BYTES, f"{size:,} bytes; at most {max_bytes:,} are read (--max-bytes)"
        )


def row_error(reason: Reason, error: Exception | str) -> RowError:
    """A message of one line and bounded length, whatever a library or a hostile file says."""
    return RowError(reason, as_text(" ".join(str(error).split()))[:_LONGEST_MESSAGE])


def blame(error: Exception, file: PatientFile | None) -> RowError:
    """What an error met while parsing `file` means; None if it could not even be opened."""
    if isinstance(error, RowError):
        return error
    if isinstance(error, FileNotFoundError):
        return row_error(Reason.NOT_FOUND, f"{_GONE}: {error}")
    if file is None or file.failure is not None:
        return row_error(Reason.READ_ERROR, (file and file.failure) or error)
    return row_error(Reason.SOURCE_DAMAGED, error)
