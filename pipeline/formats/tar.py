"""The rows of a WebDataset shard: its images and its documents' pages, streamed one by one."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.formats.documents import copied, rows_of_file
from pipeline.formats.row import (
    STREAM_BYTES,
    ReadSettings,
    Row,
    blame,
    check_size,
    row_error,
)
from pipeline.listing import as_text
from pipeline.render.renderer import Renderer
from pipeline.sources import is_hidden, kind_of
from pipeline.storage import PatientFile
from schemas.errors import EngineError, Reason, RowError
from schemas.ledger import Unit, UnitKind

_LONGEST_HEADER = 1024**2  # names and attributes; tarfile reads them whole
_NUMBERED = re.compile(r"#\d+$")
_READ_WHOLE = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def tar_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    """A row for each image, and for each page of a document, named as it is in the tar. Other
    members are skipped; so are, in a retry, those it is not for.

    A tar cut in the middle gives its good rows, then one failed row. A member that a retry is for
    and that does not come is a failed row.
    """
    name, wanted = unit.files[0], unit.members
    fs, path = settings.source.fs, settings.source.path(name)
    seen: Counter[str] = Counter()
    missing = set(wanted or ())
    file = error = None
    try:
        with (
            Renderer(settings.pages) as renderer,
            PatientFile(fs, path, block_size=STREAM_BYTES) as file,
            tarfile.open(fileobj=file, mode="r|", bufsize=1024**2, tarinfo=StrictHeader) as tar,  # type: ignore[arg-type]
        ):
            for member in members_read(tar, file.size):
                whole = Row(name, _shown(member, seen))
                if wanted is None or whole.member in missing:
                    yield from _rows(unit, whole, tar, member, settings, renderer)
                    missing.discard(str(whole.member))
                    if wanted and not missing:
                        return
    except EngineError:  # of the renderer: it is not the tar's fault
        raise
    except Exception as caught:  # damaged headers make tarfile raise errors of many classes
        error = blame(caught, file)
    if missing:
        gone = row_error(Reason.NOT_FOUND, "it was in the tar, and is not any more")
        yield from (Row(name, member, error=error or gone) for member in sorted(missing))
        return
    if error is None and not seen:
        error = row_error(Reason.EMPTY_SOURCE, "neither an image nor a document among its members")
    if error:
        yield Row(name, None, error=error)


def members_read(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The members that become rows, links among them. Raises what tarfile raises, and at one that
    claims to end far behind the tar, of `size` bytes: tarfile would read there for days.
    """
    while (member := tar.next()) is not None:
        if tar.offset - tarfile.BLOCKSIZE >= size:  # type: ignore[attr-defined]
            raise tarfile.ReadError(
                f"damaged or cut: a member of {member.size:,} bytes in a tar of {size:,}"
            )
        tar.members.clear()  # type: ignore[attr-defined]  # else it keeps the header of every member
        is_read = kind_of(member.name) in (UnitKind.IMAGES, UnitKind.DOCUMENTS)
        is_file = member.isreg() or member.islnk() or member.issym()
        if is_read and is_file and not is_hidden(member.name):
            yield member


def check_member(member: tarfile.TarInfo, max_bytes: int) -> None:
    """Whether there are bytes of it to read, and no more than allowed. Raises RowError."""
    if not member.isreg():
        raise row_error(
            Reason.MISSING_IMAGE,
            f"a link to {member.linkname} in the tar; links in tars are not followed",
        )
    check_size(member.size, max_bytes)


def is_document_member(shown: str) -> bool:
    """Whether a member, by what its row calls it, is read as a document."""
    return kind_of(_NUMBERED.sub("", shown)) is UnitKind.DOCUMENTS


def _shown(member: tarfile.TarInfo, seen: Counter[str]) -> str:
    """A tar may hold a name twice; a row id, made from the name, may not come twice."""
    text = as_text(member.name)
    seen[text] += 1
    return text if seen[text] == 1 else f"{text}#{seen[text]}"


def _rows(
    unit: Unit,
    whole: Row,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    settings: ReadSettings,
    renderer: Renderer,
) -> Iterator[Row]:
    """Of one member. Raises what tarfile raises."""
    try:
        check_member(member, settings.max_bytes)
        reader: Any = tar.extractfile(member)
        if kind_of(member.name) is UnitKind.IMAGES:
            yield whole._replace(data=reader.read())
            return
        with copied(reader, member.name) as path:
            yield from rows_of_file(unit, whole, path, Path(path).read_bytes, settings, renderer)
    except RowError as error:
        yield whole._replace(error=error)


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
