"""The plan as Parquet files: units, and the files they were made of, a few at a time."""

import base64
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.listing import SourceFile
from pipeline.plan import Plan, plan_table
from schemas.errors import ConfigError
from schemas.ledger import FILES, PLAN, Growth, PlanTotals, Unit

PLAN_FILE, FILES_FILE = "plan.parquet", "files.parquet"  # what both files are called at first

_GROUP_NAMES = 65_536  # in a row group: what writing or reading a plan holds in memory
_KEPT = "vl01.kept"
_GROWTH = "vl01.growth"


def write_plan(plan: Plan, folder: Path) -> PlanTotals:
    """Writes the plan as it is made, into two files of a folder: units, and files of the source.

    Raises ConfigError, as making it does.
    """
    units = rows = uncounted = 0
    with files_writer(folder / FILES_FILE) as files, plan_writer(folder / PLAN_FILE) as writer:
        for group in groups(plan.units(_noted(plan.files(), files))):
            writer.write_table(plan_table(group))
            units += len(group)
            rows += sum(unit.rows or 0 for unit in group)
            uncounted += sum(unit.rows is None for unit in group)
        writer.add_key_value_metadata(kept_metadata(plan.kept()))
    if not units:
        raise ConfigError("there is nothing left to read in the source")
    return PlanTotals(units, rows, uncounted)


def _noted(files: Iterable[SourceFile], writer: "FilesWriter") -> Iterator[SourceFile]:
    for file in files:
        writer.add(file.name, state_of(file))
        yield file


def plan_writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, PLAN, compression="zstd")


def groups(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Units in lists of bounded size, each a row group."""
    group: list[Unit] = []
    names = 0
    for unit in units:
        group.append(unit)
        names += len(unit.names)
        if names >= _GROUP_NAMES:
            yield group
            group, names = [], 0
    if group:
        yield group


def read_plan(file: Any) -> Iterator[pa.Table]:
    """Units in the PLAN schema, in small tables."""
    parquet = pq.ParquetFile(file)
    for group in range(parquet.num_row_groups):
        yield parquet.read_row_group(group).replace_schema_metadata(None).cast(PLAN)


# What is stored beside the units


def kept_metadata(kept: pa.Schema) -> dict[str, str]:
    """The schema of the kept columns, which is stored with the first plan."""
    return {_KEPT: base64.b64encode(kept.serialize()).decode()}


def read_kept(file: Any) -> pa.Schema:
    metadata = pq.ParquetFile(file).metadata.metadata or {}
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(metadata[_KEPT.encode()])))


def growth_metadata(growth: Growth) -> dict[str, str]:
    return {_GROWTH: growth.to_json()}


def read_growth(file: Any) -> Growth:
    metadata = pq.ParquetFile(file).metadata.metadata or {}
    return Growth.from_json(metadata[_GROWTH.encode()])


# The files of the source


def state_of(file: SourceFile) -> int:
    """64 bits that differ when size or stamp do: in a plan of a million files they take 8 MB."""
    digest = blake2b(f"{file.size} {file.stamp}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class FilesWriter:
    """Names and states of files, in the byte order of the names."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._names: list[str] = []
        self._states: list[int] = []

    def add(self, name: str, state: int) -> None:
        self._names.append(name)
        self._states.append(state)
        if len(self._names) == _GROUP_NAMES:
            self.flush()

    def flush(self) -> None:
        self._writer.write_table(pa.table([self._names, self._states], FILES))
        self._names, self._states = [], []


@contextmanager
def files_writer(path: Path) -> Iterator[FilesWriter]:
    with pq.ParquetWriter(path, FILES, compression="zstd") as writer:
        files = FilesWriter(writer)
        yield files
        files.flush()


def read_files(file: Any) -> Iterator[tuple[str, int]]:
    """(name, state) of each file, in the byte order of the names."""
    parquet = pq.ParquetFile(file)
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group)
        yield from zip(table["name"].to_pylist(), table["state"].to_pylist(), strict=True)
