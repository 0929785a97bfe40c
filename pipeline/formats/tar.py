"""The rows of a WebDataset shard: its image members, streamed, one in memory at a time."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipeline.formats.row import (
    STREAM_BYTES,
    ReadSettings,
    Row,
    blame,
    check_size,
    read_row,
    row_error,
)
from pipeline.sources import is_hidden, is_image
from pipeline.storage import PatientFile, as_text
from schemas.errors import Reason
from schemas.ledger import Unit

_LONGEST_HEADER = 1024**2  # names and attributes; tarfile reads them whole
_READ_WHOLE = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def tar_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    """A row for each image, named as it is in the tar. Other members are skipped.

    A tar cut in the middle gives its good rows, then one failed row.
    """
    (name,) = unit.names
    fs, path = settings.source.fs, settings.source.path(name)
    seen: Counter[str] = Counter()
    file = error = None
    try:
        with (
            PatientFile(fs, path, block_size=STREAM_BYTES) as file,
            tarfile.open(fileobj=file, mode="r|", bufsize=1024**2, tarinfo=StrictHeader) as tar,  # type: ignore[arg-type]
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps the header of every member of the shard
                if is_image_member(member):
                    text = as_text(member.name)
                    seen[text] += 1
                    # A tar may hold a name twice; a row id, made from the name, may not come twice.
                    shown = text if seen[text] == 1 else f"{text}#{seen[text]}"
                    yield read_row(
                        unit, name, shown, lambda m=member: _read(tar, m, settings.max_bytes)
                    )
    except Exception as caught:  # damaged headers make tarfile raise errors of many classes
        error = blame(caught, file)
    if error is None and not seen:
        error = row_error(Reason.EMPTY_SOURCE, "no image among its members")
    if error:
        yield Row(name, None, error=error)


def is_image_member(member: tarfile.TarInfo) -> bool:
    """Whether a member becomes a row."""
    return member.isreg() and is_image(member.name) and not is_hidden(member.name)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> bytes:
    check_size(member.size, max_bytes)
    reader = tar.extractfile(member)
    assert reader is not None, "only regular files are read"
    return reader.read()


class StrictHeader(tarfile.TarInfo):
    """Says so when a tar ends without its end mark, which tarfile takes for the end of a whole one,
    and refuses a header so long that reading it would fill the memory.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "StrictHeader":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise  # the end mark
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(
                f"damaged or cut at byte {archive.offset:,}: {error}"
            ) from error

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "StrictHeader":
        header = super().frombuf(buf, encoding, errors)
        if header.type in _READ_WHOLE and header.size > _LONGEST_HEADER:
            raise tarfile.ReadError(
                f"a header of {header.size:,} bytes; expected at most a megabyte"
            )
        return header
