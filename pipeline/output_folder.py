"""The folder that a dataset is written to: whether it can be, and its files by name.

Knows nothing of plans and units but the names of their parts. What the files hold is for ledger.py.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.listing import list_files
from pipeline.storage import (
    full_address,
    is_local,
    make_folder,
    open_fs,
    patiently,
    storage_error,
    try_writing,
    write_whole,
)
from schemas.errors import ConfigError


class OutputFolder:
    """OUT, and OUT/_vl01 in it."""

    def __init__(self, output: str, endpoint_url: str | None = None) -> None:
        self.fs, self.root = open_fs(output, endpoint_url)
        self.output = full_address(self.fs, self.root)
        self.foreign: str | None = None  # a file that `prepare` found in a new OUT

    def prepare(self) -> None:
        """Makes sure that OUT can be written and is ours or empty. Raises ConfigError."""
        with self._writing():
            for folder in ("tmp", "commits"):
                make_folder(self.fs, self._path(folder))
            self.write("writable", b"")
            self.fs.rm_file(self._path("writable"))

    def check(self) -> None:
        """Raises the ConfigError that `prepare` would raise, and leaves nothing behind."""
        with self._writing():
            try_writing(self.fs, self.root)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            if "memory" in self.fs.protocol:
                raise ConfigError(
                    f"cannot write to {self.output}: it is gone when this command ends; expected a"
                    " folder or an address of storage that stays"
                )
            if self.fs.isfile(self.root):
                raise ConfigError(f"cannot write to {self.output}: it is a file, not a folder")
            if not self.fs.exists(self._path("job.json")):
                self._refuse_foreign_rows()
            yield
        except ConfigError:
            raise
        except Exception as error:  # storage clients raise far more than OSError
            raise ConfigError(f"cannot write to {self.output}: {storage_error(error)}") from error

    def _refuse_foreign_rows(self) -> None:
        if not self.fs.isdir(self.root):
            return
        for name, *_ in list_files(self.fs, self.root, lambda folder: folder != "_vl01"):
            if name.endswith(".parquet") and not name.startswith("_vl01/"):
                raise ConfigError(
                    f"{self.output} already holds Parquet files that are not of this tool "
                    f"({name}); give an empty folder"
                )
            if self.foreign is None and not any(step[0] in "._" for step in name.split("/")):
                self.foreign = name

    # Files

    @staticmethod
    def part_name(unit: int) -> str:
        return f"part-{unit:09}.parquet"

    def part_path(self, unit: int) -> str:
        return f"{self.root}/{self.part_name(unit)}"

    def read_part(self, unit: int) -> bytes:
        """Raises FileNotFoundError."""
        data: Any = patiently(lambda: self.fs.cat_file(self.part_path(unit)))
        return data

    def read(self, name: str) -> bytes:
        """A file of _vl01. Raises FileNotFoundError."""
        try:
            data: Any = patiently(lambda: self.fs.cat_file(self._path(name)))
        except NotADirectoryError as error:  # OUT is a file
            raise FileNotFoundError(self._path(name)) from error
        return data

    def write(self, name: str, data: bytes) -> None:
        """A file of _vl01, whole or not at all."""
        write_whole(self.fs, self._path(name), data, self._path("tmp"))

    def remove(self, name: str) -> None:
        self.fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/_vl01/{name}"

    @contextmanager
    def scratch(self, *names: str) -> Iterator[Path]:
        """A folder of this machine for unfinished files of these names, on the disk of OUT if that
        is here."""
        with tempfile.TemporaryDirectory() as elsewhere:
            folder = Path(self._path("tmp") if is_local(self.fs) else elsewhere)
            try:
                yield folder
            finally:
                for name in names:  # that were not put in place
                    (folder / name).unlink(missing_ok=True)
