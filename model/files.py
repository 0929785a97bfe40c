"""The files of a checkpoint, in a folder on disk or at any fsspec address; reads are patient.

Knows no format and no tensor, and imports no torch.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from schemas.errors import CheckpointError, ConfigError, EngineError

T = TypeVar("T")

READ_TRIES = 6
READ_FIRST_WAIT_S = 0.5  # doubled after every try: 15.5 s in all
UNFINISHED = ".part"  # ends the names of files that are being written
_S3 = ("s3", "s3a")
# These will not be otherwise a second later.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def open_fs(address: str, endpoint_url: str | None = None) -> tuple[AbstractFileSystem, str]:
    """The file system of an address and the path on it. Raises ConfigError.

    endpoint_url: an S3 server other than AWS's own; other file systems do not look at it.
    """
    if "://" not in address:  # fsspec would take a path with :: in it for a chain of file systems
        return LocalFileSystem(), os.path.abspath(address)
    protocol = get_protocol(address)
    # Listings are never cached: what other processes write must be seen.
    options: dict[str, Any] = {"use_listings_cache": False} if protocol in _S3 else {}
    if protocol in _S3 and endpoint_url:
        options["endpoint_url"] = endpoint_url
    try:
        fs, path = url_to_fs(address, **options)
    except ImportError as error:
        extra = " (pip install 'vl01-batch[s3]')" if protocol in _S3 else ""
        raise ConfigError(f"cannot open {address}: {error}{extra}") from error
    except Exception as error:  # of a chain: its archive is opened here, and may be none
        raise ConfigError(f"cannot open {address}: {storage_error(error)}") from error
    return fs, os.path.normpath(path) if is_local(fs) else path.rstrip("/")


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def patiently(operation: Callable[[], T], tries: int, first_wait_s: float) -> T:
    """What `operation` returns, tried again when storage fails. Raises its last error.

    A file that is not there or not ours to read will not be so a second later either.
    """
    for attempt in count(1):
        try:
            return operation()
        except _FINAL:
            raise
        except Exception:  # storage clients raise far more than OSError
            if attempt == tries:
                raise
            time.sleep(first_wait_s * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def lacks_credentials(error: Exception) -> bool:
    """Whether it is botocore's, which may not be installed, for a store it has no key to."""
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")


def storage_error(error: Exception) -> str:
    """What a storage client says, in one line, with advice where it has none."""
    text = " ".join(str(error).split()) or repr(error)
    if lacks_credentials(error):
        text += "; S3 takes them from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, from ~/.aws, or"
        text += " from the role of the machine"
    return text


class FileState(NamedTuple):
    """size: in bytes. stamp: changes when the file does, where the storage tells."""

    size: int
    stamp: str


def _stamp(info: dict[str, Any]) -> str:
    """From fsspec's description of a file."""
    return str(next((info[key] for key in ("ETag", "mtime", "LastModified") if key in info), ""))


def _bytes(data: Any) -> bytes:
    """Of a file: fsspec's types allow for text, which it never returns."""
    return data


@dataclass(frozen=True)
class Folder:
    """A folder at a path or an address. Can be sent to other processes.

    endpoint_url: as for `open_fs`. Methods raise CheckpointError for what is not there, not to be
    read or shorter than it was, and EngineError when storage fails again and again.
    """

    address: str
    endpoint_url: str | None = None

    @classmethod
    def at(cls, where: "Checkpoint") -> "Folder":
        return where if isinstance(where, Folder) else cls(str(where))

    def __str__(self) -> str:
        return self.address

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "endpoint_url": self.endpoint_url}

    @cached_property
    def _opened(self) -> tuple[AbstractFileSystem, str]:
        return open_fs(self.address, self.endpoint_url)

    @property
    def fs(self) -> AbstractFileSystem:
        return self._opened[0]

    @property
    def is_local(self) -> bool:
        return is_local(self.fs)

    def path(self, name: str) -> str:
        """Of a file, on `fs`."""
        return f"{self._opened[1]}/{name}"

    def describe(self, name: str) -> str:
        """Of a file, as a user knows it."""
        return f"{self.address.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        return name in self.files()  # fsspec's isfile says no also when the storage fails

    def files(self) -> dict[str, FileState]:
        """The files right in the folder, by name; none when there is no such folder."""
        try:
            infos = self._patiently("", lambda: self.fs.ls(self._opened[1], detail=True))
        except FileNotFoundError:
            return {}
        return {
            info["name"].rpartition("/")[2]: FileState(int(info["size"]), _stamp(info))
            for info in infos
            if info["type"] == "file"
        }

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError too."""
        return self._patiently(name, lambda: _bytes(self.fs.cat_file(self.path(name))))

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a file from `offset` on. Safe to call from threads."""
        if not target:  # an empty range would be taken for none at all
            return
        read = self._read_local if self.is_local else self._read_remote
        found = self._patiently(name, lambda: read(self.path(name), offset, target))
        if found < len(target):
            raise CheckpointError(
                f"{self.describe(name)} ends at {offset + found:,} bytes; expected "
                f"{offset + len(target):,} or more. It was cut short: copy it again."
            )

    @staticmethod
    def _read_local(path: str, offset: int, target: memoryview) -> int:
        """How many bytes there were."""
        filled = 0
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while filled < len(target):  # one read returns at most 2 GiB, and on some disks less
                found = os.preadv(descriptor, [target[filled:]], offset + filled)
                if not found:
                    break
                filled += found
        finally:
            os.close(descriptor)
        return filled

    def _read_remote(self, path: str, offset: int, target: memoryview) -> int:
        data = _bytes(self.fs.cat_file(path, start=offset, end=offset + len(target)))
        if len(data) > len(target):
            raise OSError(f"asked for {len(target):,} bytes, the storage sent {len(data):,}")
        target[: len(data)] = data
        return len(data)

    def _patiently(self, name: str, operation: Callable[[], T]) -> T:
        try:
            return patiently(operation, READ_TRIES, READ_FIRST_WAIT_S)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(self.describe(name)) from error
        except _FINAL as error:
            raise CheckpointError(f"{self.describe(name)} cannot be read: {error}") from error
        except Exception as error:
            raise EngineError(
                f"{self.describe(name)} could not be read in {READ_TRIES} tries: "
                + storage_error(error)
            ) from error

    @contextmanager
    def local_copy(self, names: Iterable[str]) -> Iterator[Path]:
        """A folder of this machine with those of the files that are there."""
        if self.is_local:
            yield Path(self._opened[1])
            return
        with tempfile.TemporaryDirectory(prefix="vl01-checkpoint-") as scratch:
            for name in self.files().keys() & set(names):
                (Path(scratch) / name).write_bytes(self.read(name))
            yield Path(scratch)

    def inside(self, name: str) -> "Folder":
        """A folder in it."""
        return Folder(self.describe(name), self.endpoint_url)

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A file to write into, which on a disk is there whole or not at all. On other storage it
        may be cut short when the writing fails. Raises what the storage raises."""
        if not self.is_local:
            with self.fs.open(self.path(name), "wb") as file:
                yield file
            return
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid4().hex}{UNFINISHED}")
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """A whole file. Raises what the storage raises."""
        with self.writing(name) as file:
            file.write(data)

    def remove(self, name: str) -> None:
        """A file. Raises what the storage raises."""
        self.fs.rm_file(self.path(name))

    def free_bytes(self) -> int | None:
        """What still fits on its disk; None where that cannot be said."""
        if not self.is_local:
            return None
        path = Path(self._opened[1])
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


Checkpoint = str | Path | Folder
