"""The stored plan: units as Parquet rows, read back a few at a time however many there are."""

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import Plan, plan_table
from schemas.errors import ConfigError
from schemas.ledger import PLAN, Unit

_GROUP_NAMES = 65_536  # in a row group: what writing or reading a plan holds in memory
_KEPT = "vl01.kept"


@dataclass(frozen=True)
class PlanTotals:
    """rows: of the units that could be counted; the others are read to be counted."""

    units: int
    rows: int
    uncounted_units: int


def write_plan(plan: Plan, path: Path) -> PlanTotals:
    """Writes the plan as it is made. Raises ConfigError, as making it does."""
    units = rows = uncounted = 0
    with pq.ParquetWriter(path, PLAN, compression="zstd") as writer:
        for group in _groups(plan.units()):
            writer.write_table(plan_table(group))
            units += len(group)
            rows += sum(unit.rows or 0 for unit in group)
            uncounted += sum(unit.rows is None for unit in group)
        kept = base64.b64encode(plan.kept().serialize()).decode()
        writer.add_key_value_metadata({_KEPT: kept})
    if not units:
        raise ConfigError("there is nothing left to read in the source")
    return PlanTotals(units, rows, uncounted)


def read_plan(file: Any) -> Iterator[pa.Table]:
    """Units in the PLAN schema, in small tables."""
    parquet = pq.ParquetFile(file)
    for group in range(parquet.num_row_groups):
        yield parquet.read_row_group(group).replace_schema_metadata(None).cast(PLAN)


def read_kept(file: Any) -> pa.Schema:
    """The schema of the kept columns, which is stored with the plan."""
    metadata = pq.ParquetFile(file).metadata.metadata or {}
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(metadata[_KEPT.encode()])))


def _groups(units: Iterable[Unit]) -> Iterator[list[Unit]]:
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
