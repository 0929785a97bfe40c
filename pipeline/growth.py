"""Compares a source with what its output has planned: new files become new units, and of units
with files that are others now the rows are to be done again.

One pass over the listing and over the stored list of files, both in the order of names.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pipeline.listing import SourceFile
from pipeline.plan import Plan, plan_table, units_of
from pipeline.plan_file import (
    FILES_FILE,
    PLAN_FILE,
    FilesWriter,
    files_writer,
    groups,
    growth_metadata,
    plan_writer,
    state_of,
)
from pipeline.sources import Source
from pipeline.stored_plan import StoredPlan
from schemas.job import Job
from schemas.ledger import Growth, PlanTotals, Unit, UnitKind

_THREADS = 32


def find_growth(job: Job, source: Source, stored: StoredPlan, settled: int, folder: Path) -> Growth:
    """Writes the two files of a growth into a folder of this machine; it has the number of the last
    one when nothing is new or changed.

    settled: of the new growth, should it become one.

    Raises ConfigError: the source cannot be listed, columns that are kept have other types now.
    """
    plan = Plan.of(job, source, stored.kept)
    totals = _Totals(stored.totals)
    with files_writer(folder / FILES_FILE) as files, plan_writer(folder / PLAN_FILE) as writer:
        compared = _Comparison(plan, stored.files(), files)
        for group in groups(plan.units(compared.new_files(source.files()), totals.units)):
            totals.add(group)
            writer.write_table(plan_table(group))
        for group in groups(_changes(stored, plan, compared.changed, totals)):
            writer.write_table(plan_table(group))
        grown = bool(compared.new or compared.changed)
        growth = Growth(
            number=stored.growth.number + grown,
            totals=totals.frozen(),
            settled=settled,
            new_files=compared.new,
            changed_files=len(compared.changed),
            gone_files=compared.gone,
            waiting_files=compared.waiting,
        )
        writer.add_key_value_metadata(growth_metadata(growth))
    return growth


class _Comparison:
    """One pass over two lists in the same order; the joined list is written on the way."""

    def __init__(self, plan: Plan, known: Iterable[tuple[str, int]], files: FilesWriter) -> None:
        self.changed: list[str] = []
        self.new = self.gone = self.waiting = 0
        self._plan = plan
        self._known = iter(known)
        self._files = files

    def new_files(self, listed: Iterable[SourceFile]) -> Iterator[SourceFile]:
        old = next(self._known, None)
        for file in listed:
            while old and old[0] < file.name:
                self._keep(old)
                old = next(self._known, None)
            known = old if old and old[0] == file.name else None
            if known:
                old = next(self._known, None)
            state = state_of(file)
            if known and known[1] == state:
                self._files.add(*known)
            elif not self._plan.is_settled(file):
                self.waiting += 1
                if known:
                    self._files.add(*known)
            else:
                self._files.add(file.name, state)
                if known:
                    self.changed.append(file.name)
                else:
                    self.new += 1
                    yield file
        while old:
            self._keep(old)
            old = next(self._known, None)

    def _keep(self, gone: tuple[str, int]) -> None:
        """Files that are gone stay known: they are not new when they come back as they were."""
        self.gone += 1
        self._files.add(*gone)


class _Totals:
    """Those of the plan, as it grows."""

    def __init__(self, totals: PlanTotals) -> None:
        self.units, self._rows = totals.units, totals.rows
        self._uncounted = totals.uncounted_units

    def add(self, units: list[Unit]) -> None:
        self.units += len(units)
        for unit in units:
            self._count(unit, 1)

    def change(self, old: Unit, new: Unit) -> None:
        self._count(old, -1)
        self._count(new, 1)

    def _count(self, unit: Unit, sign: int) -> None:
        self._rows += sign * (unit.rows or 0)
        self._uncounted += sign * (unit.rows is None)

    def frozen(self) -> PlanTotals:
        return PlanTotals(self.units, self._rows, self._uncounted)


def _changes(stored: StoredPlan, plan: Plan, changed: list[str], totals: _Totals) -> Iterator[Unit]:
    """Of the units there are, what is to be done again; and new units, with numbers, for what
    files hold beyond that."""
    if not changed:
        return
    cut_up: defaultdict[str, list[Unit]] = defaultdict(list)
    for unit in _units_with(stored, set(changed)):
        if unit.kind in (UnitKind.PARQUET, UnitKind.LIST):
            cut_up[unit.files[0]].append(unit)
        else:
            yield unit
    with ThreadPoolExecutor(_THREADS) as pool:
        for olds, (again, new) in zip(
            cut_up.values(), pool.map(plan.again, cut_up.values()), strict=True
        ):
            yield from _done_again(olds, again, totals)
            yield from _numbered(new, totals)


def _done_again(olds: list[Unit], again: list[Unit], totals: _Totals) -> Iterator[Unit]:
    before = {old.number: old for old in olds}
    for unit in again:
        totals.change(before[unit.number], unit)
        if unit.rows != 0 or before[unit.number].rows != 0:
            yield unit


def _numbered(new: list[Unit], totals: _Totals) -> Iterator[Unit]:
    for number, unit in enumerate(new, totals.units):
        yield replace(unit, number=number)
    totals.add(new)


def _units_with(stored: StoredPlan, changed: set[str]) -> Iterator[Unit]:
    """The units that hold some of the files, with only those of its names where it holds several;
    units of one file in the order of their rows."""
    for table in stored.units():
        for unit in units_of(table):
            mine = tuple(name for name in unit.files if name in changed)
            if not mine:
                continue
            if unit.kind is UnitKind.IMAGES:
                yield replace(unit, names=mine, rows=len(mine))
            elif unit.kind is UnitKind.DOCUMENTS:
                yield replace(unit, names=mine)
            else:
                yield unit
