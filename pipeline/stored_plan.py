"""The plan that an output keeps: its first units, and what its source has grown by since.

    _vl01/plan.parquet                the units, and the schema of the kept columns
    _vl01/files.parquet               the files they were made of: names and states
    _vl01/growth/000001.parquet       the units of files that were new the next time, and what is to
                                      be done again of earlier units; there whole or not at all
    _vl01/growth/000001.files.parquet all files known since then; written before the above

Reads what is stored. How a source is compared with it is for growth.py.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.listing import list_flat
from pipeline.plan import plan_table, units_of
from pipeline.plan_file import (
    FILES_FILE,
    PLAN_FILE,
    read_files,
    read_growth,
    read_kept,
    read_plan,
)
from pipeline.storage import PatientFile, make_folder, put_in_place
from schemas.ledger import Growth, PlanTotals, Unit, UnitKind

_GROWTH = re.compile(r"(\d{6})\.parquet")


class StoredPlan:
    """kept: the columns carried over from the source. growth: the newest one."""

    def __init__(self, fs: AbstractFileSystem, folder: str, first: PlanTotals) -> None:
        """folder: _vl01. first: what its plan.parquet holds. Raises what the storage raises."""
        self._fs, self._folder = fs, folder
        self._first = first
        with self._open(PLAN_FILE) as file:
            self.kept = read_kept(file)
        names = [name for name in list_flat(fs, f"{folder}/growth") if _GROWTH.fullmatch(name)]
        self.growth = Growth(0, first)
        if names:
            with self._open(f"growth/{max(names)}") as file:
                self.growth = read_growth(file)

    @property
    def totals(self) -> PlanTotals:
        return self.growth.totals

    def units(self) -> Iterator[pa.Table]:
        """All units once, as they are now, in the PLAN schema, in small tables."""
        now = self._redefined()
        with self._open(PLAN_FILE) as file:
            for table in read_plan(file):
                yield _updated(table, now)
        units = self._first.units
        for number in range(1, self.growth.number + 1):
            with self._open(_name(number)) as file:
                for table in read_plan(file):
                    yield _updated(table.filter(pa.array(table["unit"].to_numpy() >= units)), now)
                units = read_growth(file).totals.units

    def changed(self, after: int = 0) -> dict[int, list[tuple[int, Unit]]]:
        """What is to be done again, by unit: (growth that found it, the unit with only the names
        that changed), of the growths after one."""
        found: defaultdict[int, list[tuple[int, Unit]]] = defaultdict(list)
        for number in range(after + 1, self.growth.number + 1):
            with self._open(_name(number)) as file:
                first = self._units_before(number)
                for table in read_plan(file):
                    for unit in units_of(table.filter(pa.array(table["unit"].to_numpy() < first))):
                        found[unit.number].append((number, unit))
        return found

    def files(self) -> Iterator[tuple[str, int]]:
        """(name, state) of every file there was, as it was seen last, in the order of names.
        Raises FileNotFoundError."""
        name = _name(self.growth.number, ".files") if self.growth.number else FILES_FILE
        with self._open(name) as file:
            yield from read_files(file)

    def store(self, folder: Path, growth: Growth) -> None:
        """Puts the two files of a growth, which lie in a folder of this machine, in their place:
        with the second it counts."""
        make_folder(self._fs, f"{self._folder}/growth")
        files, plan = _name(growth.number, ".files"), _name(growth.number)
        put_in_place(self._fs, folder / FILES_FILE, f"{self._folder}/{files}")
        put_in_place(self._fs, folder / PLAN_FILE, f"{self._folder}/{plan}")

    def clean_up(self) -> None:
        """Removes lists of files that a newer growth has made useless, or that no growth counts."""
        newest = _name(self.growth.number, ".files")
        for name in list_flat(self._fs, f"{self._folder}/growth"):
            if name.endswith(".files.parquet") and f"growth/{name}" != newest:
                self._fs.rm_file(f"{self._folder}/growth/{name}")

    def _redefined(self) -> dict[int, Unit]:
        """Units of rows of a file that has fewer or more of them now."""
        return {
            number: changes[-1][1]
            for number, changes in self.changed().items()
            if changes[-1][1].kind is UnitKind.PARQUET
        }

    def _units_before(self, number: int) -> int:
        if number == 1:
            return self._first.units
        with self._open(_name(number - 1)) as file:
            return read_growth(file).totals.units

    def _open(self, name: str) -> PatientFile:
        return PatientFile(self._fs, f"{self._folder}/{name}", cache_type="none")


def joined(changes: list[Unit]) -> Unit:
    """Several changes of one unit as one."""
    if changes[-1].kind is UnitKind.PARQUET:
        return changes[-1]
    names = tuple(dict.fromkeys(name for unit in changes for name in unit.names))
    rows = len(names) if changes[-1].kind is UnitKind.IMAGES else None
    return replace(changes[-1], names=names, rows=rows)


def _updated(table: pa.Table, now: dict[int, Unit]) -> pa.Table:
    if not now or not any(number in now for number in table["unit"].to_pylist()):
        return table
    return plan_table([now.get(unit.number, unit) for unit in units_of(table)])


def _name(number: int, what: str = "") -> str:
    return f"growth/{number:06}{what}.parquet"
