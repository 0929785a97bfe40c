"""The rows of documents: one for each page of a PDF or of a TIFF with several frames.

Of whole files, and of what is inside of others.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO

from pipeline.formats.row import (
    STREAM_BYTES,
    ReadSettings,
    Row,
    blame,
    check_size,
    read_file,
    read_row,
    row_error,
)
from pipeline.render.renderer import Renderer
from pipeline.sources import kind_of
from pipeline.storage import PatientFile, is_local, patiently
from schemas.errors import Reason, RowError
from schemas.ledger import Unit, UnitKind

_PDF, _PDF_WITHIN = b"%PDF-", 1024  # bytes; the mark may follow others
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def document_rows(unit: Unit, settings: ReadSettings) -> Iterator[Row]:
    """A document that cannot be opened is one failed row without a page, and so is what follows
    the last frame that can be reached. A file with one image is its row, as anywhere else.
    """
    with Renderer(settings.pages) as renderer:
        for name in unit.names:
            try:
                with on_disk(settings, name) as path:
                    image = partial(read_file, settings, name)
                    whole = Row(name, None)
                    yield from rows_of_file(unit, whole, path, image, settings, renderer)
            except RowError as error:
                yield Row(name, None, error=error)


def rows_of_file(
    unit: Unit,
    whole: Row,
    path: str,
    image: Callable[[], bytes],
    settings: ReadSettings,
    renderer: Renderer,
) -> Iterator[Row]:
    """The pages of a document, or the row `whole` for a file that is an image, which `image` has
    the bytes of. Raises RowError when it is neither, or broken after its pages.
    """
    name, member = whole.name, whole.member
    pages, broken = renderer.open(path)
    if pages is None:
        yield read_row(unit, name, member, image)
        return
    check_pages(pages, settings.pages.max_pages)
    for page in range(1, pages + 1):
        yield read_row(unit, name, member, partial(renderer.image, page), page)
    if broken:
        raise row_error(Reason.SOURCE_DAMAGED, broken)


def rows_within(
    unit: Unit, whole: Row, file: IO[bytes], settings: ReadSettings, renderer: Renderer
) -> Iterator[Row]:
    """The same of an open file at its start, of which nothing but its content tells what it is; a
    document that cannot be opened is the row `whole` with its reason."""
    if not begins_like_document(file):
        yield whole._replace(data=file.read())
        return
    try:
        with copied(file) as path:
            file.seek(0)
            yield from rows_of_file(unit, whole, path, file.read, settings, renderer)
    except RowError as error:
        yield whole._replace(error=error)


def begins_like_document(file: IO[bytes]) -> bool:
    """Whether a file, which is at its start and stays there, begins like a PDF or a TIFF."""
    begin = file.read(_PDF_WITHIN)
    file.seek(0)
    return begin.startswith(_TIFF) or _PDF in begin


def check_pages(pages: int, max_pages: int) -> None:
    """Raises RowError."""
    if pages == 0:
        raise RowError(Reason.EMPTY_SOURCE, "it has no pages")
    if pages > max_pages:
        raise RowError(
            Reason.TOO_MANY_PAGES, f"more than {max_pages:,} pages are not read (--max-pages)"
        )


@contextmanager
def on_disk(settings: ReadSettings, name: str) -> Iterator[str]:
    """The path of a file on this machine, for another process: of itself, or of a copy made a
    block at a time. Raises RowError.
    """
    fs, path = settings.source.fs, settings.source.path(name)
    if is_local(fs):
        check_size(_size(settings, name), settings.max_bytes)
        yield path
        return
    file = None
    with ExitStack() as copying:
        try:
            with PatientFile(fs, path, block_size=STREAM_BYTES) as file:
                check_size(file.size, settings.max_bytes)
                copy = copying.enter_context(copied(file, name))
        except Exception as error:  # storage clients raise far more than OSError
            raise blame(error, file) from error
        yield copy


@contextmanager
def copied(file: IO[bytes] | PatientFile, name: str = "") -> Iterator[str]:
    """The path of a copy of a file from where it is read to its end, for another process. The copy
    ends like `name`, by which a PDF is known that does not begin like one."""
    ending = "." + name.rpartition(".")[2] if kind_of(name) is UnitKind.DOCUMENTS else ""
    with tempfile.NamedTemporaryFile(suffix=ending) as copy:
        shutil.copyfileobj(file, copy, STREAM_BYTES)
        copy.flush()
        yield copy.name


def _size(settings: ReadSettings, name: str) -> int:
    path = settings.source.path(name)
    try:
        return patiently(lambda: settings.source.fs.info(path)["size"])
    except Exception as error:
        raise blame(error, None) from error
