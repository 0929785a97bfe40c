"""The layout of images from their headers: of files, of some rows of a tar or a Parquet file.

Of documents it asks a renderer, which renders nothing for it.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any

from model.inputs.images import DecodeLimits, image_size
from model.inputs.tiling import Layout, Pinpoints, choose_layout
from pipeline.fetch.fetch import Fetched
from pipeline.formats.documents import begins_like_document, check_pages, copied, on_disk
from pipeline.formats.lists import fetched_addresses
from pipeline.formats.parquet import cells
from pipeline.formats.row import ReadSettings, blame, check_size
from pipeline.formats.tar import StrictHeader, check_member, members_read
from pipeline.lists import is_one_row
from pipeline.render.renderer import Renderer
from pipeline.sources import kind_of
from pipeline.storage import PatientFile
from schemas.errors import EngineError, Reason, RowError
from schemas.ledger import Unit, UnitKind

_BLOCK_BYTES = 64 * 1024  # asked for at once; most headers are shorter
_TAR_BLOCK_BYTES = 1024**2  # holds the next members too when they are small
_MOST_BYTES = 8 * 1024**2  # of one image; WebP and AVIF are read whole
_MOST_PARQUET_BYTES = 256 * 1024**2  # of one slice


@dataclass(frozen=True)
class Cluster:
    """What was seen of rows that lie together.

    rows: how many there are; estimated unless `counted`. seen: of some or all of them, the layout
    of the image, or the reason why the row will fail. pages: they are those of a document.
    """

    rows: float
    counted: bool
    seen: list[Layout | Reason]
    pages: bool = False


@dataclass(frozen=True)
class HeaderReader:
    """Sees an image as `Prepare` will, but for what is behind its header."""

    read: ReadSettings
    limits: DecodeLimits
    exif_rotate: bool
    pinpoints: Pinpoints
    tile: int
    patch: int

    def look_into(self, unit: Unit, most_rows: int) -> list[Cluster]:
        """At most `most_rows` images or documents of each file in a unit, and as many pages of each
        document. Never raises for bad input.
        """
        if unit.kind is UnitKind.IMAGES:
            return [self._image(name) for name in unit.names]
        with Renderer(self.read.pages) as renderer:
            if unit.kind is UnitKind.TAR:
                return self._tar(unit, most_rows, renderer)
            if unit.kind is UnitKind.PARQUET:
                return self._parquet(unit, most_rows, renderer)
            if unit.kind is UnitKind.LIST:
                return [
                    self._fetched(unit.names[place + 1], fetched, most_rows, renderer)
                    for place, fetched in fetched_addresses(unit, self.read)
                ]
            return [self._document_file(name, most_rows, renderer) for name in unit.names]

    def _image(self, name: str) -> Cluster:
        return _one(self._file(name))

    def _document_file(self, name: str, most_rows: int, renderer: Renderer) -> Cluster:
        try:
            with on_disk(self.read, name) as path:
                return self._document(path, most_rows, renderer) or self._image(name)
        except RowError as error:
            return Cluster(1, True, [error.reason])

    def _document(self, path: str, most_rows: int, renderer: Renderer) -> Cluster | None:
        """Pages from its beginning to its end, at even distances; None for what is an image.
        Raises RowError."""
        pages, broken = renderer.open(path)
        if pages is None:
            return None
        check_pages(pages, self.read.pages.max_pages)
        numbers = range(1, pages + 1, -(-pages // most_rows))
        seen = [self._page(renderer, number) for number in numbers]
        if broken:
            seen.append(Reason.SOURCE_DAMAGED)
        return Cluster(pages + bool(broken), True, seen, pages=True)

    def _fetched(
        self, member: str, fetched: Fetched, most_rows: int, renderer: Renderer
    ) -> Cluster:
        if fetched.file is None:
            return Cluster(1, True, [fetched.error.reason] if fetched.error else [])
        with fetched.file as file:
            return self._within(file, most_rows, None if is_one_row(member) else renderer)

    def _within(self, file: Any, most_rows: int, renderer: Renderer | None) -> Cluster:
        """An open file at its start. renderer: None where it is one image, whatever is in it."""
        try:
            if renderer and begins_like_document(file):
                with copied(file) as path:
                    if (document := self._document(path, most_rows, renderer)) is not None:
                        return document
                file.seek(0)
            return _one(self._layout(file))
        except RowError as error:
            return Cluster(1, True, [error.reason])

    def _page(self, renderer: Renderer, number: int) -> Layout | Reason:
        try:
            return choose_layout(*renderer.size(number), self.pinpoints, self.tile, self.patch)
        except RowError as error:
            return error.reason

    def _file(self, name: str) -> Layout | Reason | None:
        source, file = self.read.source, None
        try:
            path = source.path(name)
            with PatientFile(source.fs, path, block_size=_BLOCK_BYTES) as file:
                check_size(file.size, self.read.max_bytes)
                return self._layout(file)
        except Exception as error:  # storage clients raise far more than OSError
            return blame(error, file).reason

    def _tar(self, unit: Unit, most_rows: int, renderer: Renderer) -> list[Cluster]:
        """One for each image or document that is looked at."""
        (name,) = unit.names
        source, file = self.read.source, None
        found: list[Cluster] = []
        try:
            with (
                PatientFile(source.fs, source.path(name), block_size=_TAR_BLOCK_BYTES) as file,
                _open_tar(file) as tar,
            ):
                for member in _whole_members(tar, file.size):
                    if len(found) == most_rows:  # the rest is taken to be as dense
                        return _scaled(found, file.size / member.offset)
                    found.append(self._member(tar, member, most_rows, renderer))
        except EngineError:  # of the renderer: it is not the tar's fault
            raise
        except Exception as error:  # damaged headers make tarfile raise errors of many classes
            found.append(Cluster(1, True, [blame(error, file).reason]))
        return found or [Cluster(1, True, [Reason.EMPTY_SOURCE])]

    def _member(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, most_rows: int, renderer: Renderer
    ) -> Cluster:
        try:
            check_member(member, self.read.max_bytes)
            file: Any = tar.extractfile(member)
            if kind_of(member.name) is UnitKind.DOCUMENTS:
                with copied(file, member.name) as path:
                    if (document := self._document(path, most_rows, renderer)) is not None:
                        return document
                file.seek(0)
            return _one(self._layout(file))
        except RowError as error:
            return Cluster(1, True, [error.reason])

    def _parquet(self, unit: Unit, most_rows: int, renderer: Renderer) -> list[Cluster]:
        """One for each cell that is looked at; the others are taken to be like them."""
        found: list[Cluster] = []
        size = 0
        for row, image in islice(cells(unit, self.read), most_rows):
            if image is None:
                found.append(Cluster(1, True, [row.error.reason] if row.error else []))
                continue
            with image:
                size += image.seek(0, io.SEEK_END)
                image.seek(0)
                if size > _MOST_PARQUET_BYTES:
                    break
                found.append(self._within(image, most_rows, renderer))
        planned = unit.rows or len(found)
        if not found:
            return [Cluster(planned, True, [])]
        return found if planned == len(found) else _scaled(found, planned / len(found))

    def _layout(self, file: Any) -> Layout | None:
        """None when the header is not found within _MOST_BYTES. Raises RowError."""
        start = _Start(file)
        try:
            size = image_size(start, self.limits, self.exif_rotate)  # type: ignore[arg-type]
        except RowError:
            if start.exceeded:
                return None
            raise
        return choose_layout(*size, self.pinpoints, self.tile, self.patch)


def _open_tar(file: PatientFile) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:", tarinfo=StrictHeader)  # type: ignore[arg-type]


def _whole_members(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The members that become rows. Raises ReadError at one that the end of the tar cuts."""
    for member in members_read(tar, size):
        if member.offset_data + member.size > size:
            raise tarfile.ReadError("unexpected end of data")
        yield member


def _one(what: Layout | Reason | None) -> Cluster:
    return Cluster(1, True, [] if what is None else [what])


def _scaled(clusters: list[Cluster], factor: float) -> list[Cluster]:
    """They stand for more than themselves."""
    return [replace(each, rows=each.rows * factor, counted=False) for each in clusters]


class _Start:
    """The first bytes of a file: reading more of it fails, and is told by `exceeded`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = _MOST_BYTES
        self.exceeded = False
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left + 1 if size is None or size < 0 else size)
        self._left -= len(data)
        if self._left < 0:
            self.exceeded = True
            raise OSError("the header is too long to be looked for")
        return data
