"""The door to storage: any fsspec address, patient reads, whole writes.

Knows nothing of images, units or ledgers. What lies where is for listing.py.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from fsspec import AbstractFileSystem

from model import files
from model.files import is_local as is_local
from model.files import open_fs as open_fs
from model.files import storage_error as storage_error
from pipeline.listing import is_s3

T = TypeVar("T")

ATTEMPTS = 4
FIRST_WAIT_S = 0.5  # doubled after every attempt: 3.5 s in all


def full_address(fs: AbstractFileSystem, path: str) -> str:
    """What a user would type: a plain path on this machine, protocol://path elsewhere."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


# Reading


def patiently(operation: Callable[[], T]) -> T:
    """What `operation` returns, tried again when storage fails. Raises its last error."""
    return files.patiently(operation, ATTEMPTS, FIRST_WAIT_S)


class PatientFile:
    """A file read as a stream or at places, each read tried again on a freshly opened file.

    `failure` is the error that made a read give up: it tells a broken storage from a broken file
    once a parser has wrapped the error in its own.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, **options: Any) -> None:
        self.failure: Exception | None = None
        self.closed = False
        self._open = lambda: fs.open(path, "rb", **options)
        self._position = 0
        self._file: Any = patiently(self._open)
        self.size = int(self._file.size)

    def read(self, size: int = -1) -> bytes:
        try:
            data = patiently(lambda: self._read(size))
        except Exception as error:
            self.failure = error
            raise
        self._position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
            self._file.seek(self._position)
            return self._file.read(size)
        except Exception:
            self._file = None
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        """Nothing to flush; pyarrow asks."""

    def close(self) -> None:
        self.closed = True
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "PatientFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Writing


def make_folder(fs: AbstractFileSystem, path: str) -> None:
    if not is_s3(fs):  # it has no folders, and s3fs would make the bucket
        fs.makedirs(path, exist_ok=True)


def try_writing(fs: AbstractFileSystem, folder: str) -> None:
    """Writes below `folder` as far as that goes without leaving anything. Raises what the storage
    raises.

    A folder that is not there is not made: the one above it, which it would be made in, is tried.
    """
    if not is_local(fs):
        probe = f"{folder}/{uuid4().hex}"
        fs.pipe_file(probe, b"")
        fs.rm_file(probe)
        return
    path = Path(folder)
    while not os.path.lexists(path):
        path = path.parent
    with tempfile.TemporaryFile(dir=path):
        pass


def write_whole(fs: AbstractFileSystem, path: str, data: bytes, scratch: str) -> None:
    """A file that is there whole or not at all, also when the process or the machine dies.

    scratch: a folder on the same disk for the unfinished file; object stores need none, since
    their one PUT is atomic. Raises what the storage raises.
    """
    if not is_local(fs):
        patiently(lambda: fs.pipe_file(path, data))
        return
    unfinished = Path(scratch) / uuid4().hex
    unfinished.write_bytes(data)
    put_in_place(fs, unfinished, path)


def put_in_place(fs: AbstractFileSystem, unfinished: Path, path: str) -> None:
    """Moves a finished file of this machine to its place. When that is a place on this machine
    too, it must be on the same disk."""
    if not is_local(fs):
        patiently(lambda: fs.put_file(str(unfinished), path))
        unfinished.unlink()
        return
    _sync(unfinished, os.O_RDWR)
    os.replace(unfinished, path)
    _sync(Path(path).parent, os.O_RDONLY)  # the new name itself must survive a power cut


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
