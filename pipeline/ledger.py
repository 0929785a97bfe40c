"""What OUT holds beside its rows: the job, the plan, and a record for each unit that is done.

    OUT/part-000000123.parquet        the rows of unit 123; count only with its record
    OUT/_vl01/job.json                the job and its fingerprint; written last, seals the plan
    OUT/_vl01/plan.parquet            the units; growth/ beside it: see stored_plan.py
    OUT/_vl01/commits/000000123.json  unit 123 is done
    OUT/_vl01/replacing/              records of parts that are being replaced
    OUT/_vl01/documents/, markdown/   pages joined again, if asked for: see documents.py
    OUT/_vl01/runs/RUN.json           what a run did in all, and on what hardware
    OUT/_vl01/tmp/                    unfinished files (on a disk; object stores need none)

Every file appears whole or not at all. Who may write is for lease.py.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.fingerprint import no_dataset, refuse_another_job
from pipeline.growth import find_growth
from pipeline.listing import list_flat
from pipeline.output_folder import OutputFolder
from pipeline.plan import Plan, plan_table
from pipeline.plan_file import FILES_FILE, PLAN_FILE, write_plan
from pipeline.sources import Source
from pipeline.storage import make_folder, put_in_place, write_whole
from pipeline.stored_plan import StoredPlan, joined
from schemas.errors import ConfigError, LedgerError
from schemas.job import Job
from schemas.ledger import CommitRecord, Growth, PlanTotals, Unit
from schemas.report import RunRecord
from schemas.rows import Status

LAYOUT = 2  # of this folder; another one is not read
_PART = re.compile(r"part-(\d{9})\.parquet")
_RECORD = re.compile(r"(\d{9})\.json")
_RECORD_THREADS = 32
_VERSIONS = ("vl01-batch", "torch", "transformers", "ray", "pyarrow")
# `datasets` would take the JSON and Parquet files of _vl01 for data; others skip the underscore.
_FOR_DATASETS = "configs:\n- config_name: default\n  data_files: part-*.parquet\n"


class Ledger(OutputFolder):
    """One output folder. The attributes below are there once `resume` or `create` opened it."""

    job: dict[str, Any]  # what job.json holds
    plan: StoredPlan
    _committed: np.ndarray | None = None
    _outdated: dict[int, Unit] | None = None

    # Opening

    def resume(self, fingerprint: dict[str, Any] | None = None) -> bool:
        """Opens the run that OUT holds; False if it holds none yet.

        The stored plan is used again: only `grow` lists the source a second time. Raises
        ConfigError if OUT holds another job.
        """
        try:
            self.job = json.loads(self.read("job.json"))
        except FileNotFoundError:
            return False
        except ValueError as error:
            raise LedgerError(f"job.json of {self.output} is damaged: {error}") from error
        except Exception as error:  # storage clients raise far more than OSError
            raise ConfigError(f"cannot read {self.output}: {error}") from error
        if self.job.get("layout") != LAYOUT:
            raise ConfigError(
                f"{self.output} has layout {self.job.get('layout')}, written by another version "
                f"of this tool; this one reads layout {LAYOUT}"
            )
        if fingerprint is not None:
            refuse_another_job(self.output, self.job["fingerprint"], fingerprint)
        self._open_plan()
        return True

    @classmethod
    def of_dataset(cls, output: str, endpoint_url: str | None = None) -> "Ledger":
        """Opens the run that OUT holds. Raises ConfigError if it holds none."""
        ledger = cls(output, endpoint_url)
        if not ledger.resume():
            raise no_dataset(ledger.output)
        return ledger

    def create(self, job: Job, fingerprint: dict[str, Any], plan: Plan, run: str) -> None:
        """Stores the plan, then job.json, which makes both count. Raises ConfigError."""
        with self.scratch(FILES_FILE, PLAN_FILE) as folder:
            planned = write_plan(plan, folder)
            for name in (FILES_FILE, PLAN_FILE):
                put_in_place(self.fs, folder / name, self._path(name))
        path = f"{self.root}/.huggingface.yaml"
        write_whole(self.fs, path, _FOR_DATASETS.encode(), self._path("tmp"))
        content = {
            "layout": LAYOUT,
            "job": job.model_dump(mode="json"),
            "fingerprint": fingerprint,
            "planned": asdict(planned),
            "versions": {name: version(name) for name in _VERSIONS},
            "created_at": now(),
            "run": run,
        }
        self.write("job.json", json.dumps(content, indent=1).encode())
        self.resume(fingerprint)

    def grow(self, job: Job, source: Source) -> Growth:
        """Lists the source again and adds to the plan what is new or changed there, in one step.
        Raises ConfigError. Only for who has the lease.
        """
        with self.scratch(FILES_FILE, PLAN_FILE) as folder:
            growth = self.find_growth(job, source, folder)
            if growth.number > self.plan.growth.number:
                self.plan.store(folder, growth)
                self._open_plan()
        return growth

    def find_growth(self, job: Job, source: Source, folder: Path) -> Growth:
        """What `grow` would add, as files in a folder of this machine."""
        newest = self.plan.growth
        settled = newest.settled if self.outdated() else newest.number
        return find_growth(job, source, self.plan, settled, folder)

    def _open_plan(self) -> None:
        self._committed = self._outdated = None
        try:
            self.plan = StoredPlan(self.fs, self._path("")[:-1], PlanTotals(**self.job["planned"]))
        except Exception as error:
            raise LedgerError(f"the plan of {self.output} cannot be read: {error}") from error

    @property
    def kept(self) -> pa.Schema:
        """The columns carried over from the source."""
        return self.plan.kept

    @property
    def totals(self) -> PlanTotals:
        return self.plan.totals

    # What is done and what is not

    def planned(self) -> Iterator[pa.Table]:
        """All units in the PLAN schema, in small tables."""
        return self.plan.units()

    def committed(self) -> np.ndarray:
        """bool [units of the plan]: which units have a record. No record is read.

        Listed once, and kept up to date by `commit`: nobody else writes while the lease is held.
        """
        if self._committed is None:
            self._committed = self._list_records()
        return self._committed

    def outdated(self) -> dict[int, Unit]:
        """The committed units with files that have changed since, by number: what is to be done
        again of each. Reads the records of units that changed, and keeps it up to date."""
        if self._outdated is None:
            changed, done = self.plan.changed(after=self.plan.growth.settled), self.committed()
            numbers = [number for number in changed if done[number]]
            with ThreadPoolExecutor(_RECORD_THREADS) as pool:
                known = [record.growth for record in pool.map(self.record, numbers)]
            self._outdated = {
                number: joined([unit for growth, unit in changed[number] if growth > knows])
                for number, knows in zip(numbers, known, strict=True)
                if changed[number][-1][0] > knows
            }
        return self._outdated

    def _list_records(self) -> np.ndarray:
        done = np.zeros(self.totals.units, bool)
        for name in list_flat(self.fs, self._path("commits")):
            if match := _RECORD.fullmatch(name):
                if int(match[1]) >= self.totals.units:
                    raise LedgerError(
                        f"{self.output} has a record of unit {int(match[1])}, "
                        f"but only {self.totals.units} units are planned"
                    )
                done[int(match[1])] = True
        return done

    def pending(self) -> Iterator[pa.Table]:
        """What is to do, in the PLAN schema, in small tables: the units without a record, and of
        outdated ones the files that have changed."""
        done, again = self.committed(), self.outdated()
        for units in self.planned():
            todo = units.filter(pa.array(~done[units["unit"].to_numpy()]))
            if todo.num_rows:
                yield todo
        if again:
            yield plan_table(list(again.values()))

    def parts(self) -> Iterator[int]:
        """The units that have a part, recorded or not."""
        for name in list_flat(self.fs, self.root, "part-"):
            if match := _PART.fullmatch(name):
                yield int(match[1])

    def strangers(self) -> list[str]:
        """Parquet files beside the parts that no run wrote, and that readers of OUT take for
        some."""
        return sorted(
            name
            for name in list_flat(self.fs, self.root)
            if name.endswith(".parquet") and name[0] not in "._" and not _PART.fullmatch(name)
        )

    def clean_up(self) -> None:
        """Removes unfinished files and parts that have no record, and brings replacements that
        were cut short to their end. Only for who has the lease."""
        for name in list_flat(self.fs, self._path("tmp")):
            with suppress(FileNotFoundError):  # the lease's beat, or a run that will be refused
                self.remove(f"tmp/{name}")
        self._settle_replacements()
        self.plan.clean_up()
        done = self.committed()
        for unit in list(self.parts()):
            if unit >= len(done) or not done[unit]:
                self.fs.rm_file(self.part_path(unit))

    # Committing

    def commit(self, record: CommitRecord, part: bytes) -> None:
        """Writes the part, then the record that makes it count."""
        write_whole(self.fs, self.part_path(record.unit), part, self._path("tmp"))
        self.write(f"commits/{record.unit:09}.json", record.to_json())
        self.committed()[record.unit] = True

    def replace(self, record: CommitRecord, part: bytes) -> None:
        """Writes the part of a committed unit anew, under its name: a reader never sees a row
        twice or not at all. While it changes, one record describes the old part and one, in
        `replacing`, the new: the part itself shows which of the two is true.
        """
        name = f"{record.unit:09}.json"
        make_folder(self.fs, self._path("replacing"))
        self.write(f"replacing/{name}", record.to_json())
        write_whole(self.fs, self.part_path(record.unit), part, self._path("tmp"))
        self.write(f"commits/{name}", record.to_json())
        self.remove(f"replacing/{name}")
        if record.growth == self.plan.growth.number:
            self.outdated().pop(record.unit, None)

    def replacement(self, unit: int) -> CommitRecord | None:
        """The new record of a unit whose replacement was cut short after its part was written."""
        name = f"replacing/{unit:09}.json"
        try:
            record = CommitRecord.from_json(self.read(name), self._path(name))
            part = self.read_part(unit)
        except FileNotFoundError:
            return None
        return record if hashlib.sha256(part).hexdigest() == record.sha256 else None

    def _settle_replacements(self) -> None:
        for name in list(list_flat(self.fs, self._path("replacing"))):
            if match := _RECORD.fullmatch(name):
                if record := self.replacement(int(match[1])):
                    self.write(f"commits/{name}", record.to_json())
                self.remove(f"replacing/{name}")

    def record(self, unit: int) -> CommitRecord:
        """Raises LedgerError when it is damaged, FileNotFoundError when it is not there."""
        name = f"commits/{unit:09}.json"
        return CommitRecord.from_json(self.read(name), self._path(name))

    def failed_rows(self) -> int:
        """Failed rows of all committed units. Reads every record: 1e6 of them take minutes."""
        done = np.flatnonzero(self.committed()).tolist()
        with ThreadPoolExecutor(_RECORD_THREADS) as pool:
            records = pool.map(self.record, done)
            return sum(record.statuses.get(Status.FAILED, 0) for record in records)

    # Runs

    def write_run(self, record: RunRecord) -> None:
        make_folder(self.fs, self._path("runs"))
        self.write(f"runs/{record.run}.json", record.to_json())

    def runs(self) -> Iterator[str]:
        """The names of the runs that left a record."""
        for name in list_flat(self.fs, self._path("runs")):
            yield name.removesuffix(".json")

    def run(self, name: str) -> RunRecord:
        """Raises LedgerError when it is damaged."""
        file = f"runs/{name}.json"
        return RunRecord.from_json(self.read(file), self._path(file))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
