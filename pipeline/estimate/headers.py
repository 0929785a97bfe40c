"""The layout of images from their headers: of files, of some rows of a tar or a Parquet file.

Of documents it asks a renderer, which renders nothing for it.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from model.inputs.images import DecodeLimits, image_size
from model.inputs.tiling import Layout, Pinpoints, choose_layout
from pipeline.fetch.fetch import Fetched
from pipeline.formats.documents import check_pages, on_disk
from pipeline.formats.lists import fetched_addresses, may_be_document, named
from pipeline.formats.parquet import parquet_rows
from pipeline.formats.row import ReadSettings, blame, check_size
from pipeline.formats.tar import StrictHeader, is_image_member
from pipeline.render.renderer import Renderer
from pipeline.storage import PatientFile
from schemas.errors import Reason, RowError
from schemas.ledger import Unit, UnitKind

_BLOCK_BYTES = 64 * 1024  # asked for at once; most headers are shorter
_TAR_BLOCK_BYTES = 1024**2  # holds the next members too when they are small
_MOST_BYTES = 8 * 1024**2  # of one image; WebP and AVIF are read whole
_MOST_PARQUET_BYTES = 256 * 1024**2  # of one slice


@dataclass(frozen=True)
class Cluster:
    """What was seen of rows that lie together.

    rows: how many there are; estimated unless `counted`. seen: of some or all of them, the layout
    of the image, or the reason why the row will fail.
    """

    rows: float
    counted: bool
    seen: list[Layout | Reason]


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
        """At most `most_rows` rows of each image file, document, tar or slice of a Parquet file in
        a unit. Never raises for bad input.
        """
        if unit.kind is UnitKind.TAR:
            return [self._tar(unit, most_rows)]
        if unit.kind is UnitKind.PARQUET:
            return [self._parquet(unit, most_rows)]
        if unit.kind is UnitKind.LIST:
            with Renderer(self.read.pages) as renderer:
                return [
                    self._fetched(unit.names[place + 1], fetched, most_rows, renderer)
                    for place, fetched in fetched_addresses(unit, self.read)
                ]
        if unit.kind is UnitKind.DOCUMENTS:
            with Renderer(self.read.pages) as renderer:
                return [self._document_file(name, most_rows, renderer) for name in unit.names]
        return [self._image(name) for name in unit.names]

    def _image(self, name: str) -> Cluster:
        what = self._file(name)
        return Cluster(1, True, [] if what is None else [what])

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
        return Cluster(pages + bool(broken), True, seen)

    def _fetched(
        self, member: str, fetched: Fetched, most_rows: int, renderer: Renderer
    ) -> Cluster:
        if fetched.file is None:
            return Cluster(1, True, [fetched.error.reason] if fetched.error else [])
        try:
            with fetched.file as file:
                if may_be_document(member, file):
                    with named(file) as path:
                        if (document := self._document(path, most_rows, renderer)) is not None:
                            return document
                what = self._layout(file)
                return Cluster(1, True, [] if what is None else [what])
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

    def _tar(self, unit: Unit, most_rows: int) -> Cluster:
        (name,) = unit.names
        source, file = self.read.source, None
        seen: list[Layout | Reason | None] = []
        rows = None
        try:
            with (
                PatientFile(source.fs, source.path(name), block_size=_TAR_BLOCK_BYTES) as file,
                _open_tar(file) as tar,
            ):
                for member in _images(tar, file.size):
                    if len(seen) == most_rows:  # the rest is taken to be as dense
                        rows = len(seen) * file.size / member.offset
                        break
                    seen.append(self._member(tar, member))
        except Exception as error:  # damaged headers make tarfile raise errors of many classes
            seen.append(blame(error, file).reason)
        seen = seen or [Reason.EMPTY_SOURCE]
        return Cluster(rows or len(seen), rows is None, [what for what in seen if what is not None])

    def _member(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Layout | Reason | None:
        try:
            check_size(member.size, self.read.max_bytes)
            file: Any = tar.extractfile(member)
            return self._layout(file)
        except RowError as error:
            return error.reason

    def _parquet(self, unit: Unit, most_rows: int) -> Cluster:
        seen: list[Layout | Reason | None] = []
        size = 0
        for row in islice(parquet_rows(unit, self.read), most_rows):
            size += len(row.data or b"")
            if size > _MOST_PARQUET_BYTES:
                break
            seen.append(self._row(row.data, row.error))
        usable = [what for what in seen if what is not None]
        return Cluster(unit.rows or len(seen), True, usable)

    def _row(self, data: bytes | None, error: RowError | None) -> Layout | Reason | None:
        try:
            return error.reason if error else self._layout(io.BytesIO(data or b""))
        except RowError as unusable:
            return unusable.reason

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


def _images(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The members that become rows. Raises ReadError at one that the end of the tar cuts."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        if is_image_member(member):
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("unexpected end of data")
            yield member


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
