"""The state of a dataset is told from its ledger alone, at any moment of a run, at little cost."""

import json
import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from pipeline import lease as lease_module
from pipeline import status as status_module
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.sources import open_source
from pipeline.status import status
from schemas.errors import ConfigError, LedgerError
from schemas.ledger import CommitRecord
from tests.pipeline.fake_run import job_of, run, write_images
from tests.pipeline.test_s3 import s3, server  # noqa: F401


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(lease_module, "_SETTLE_S", 0.0)


def begin(tmp_path, rows: int = 40) -> Ledger:
    """A ledger of units of 4 rows of which none is done."""
    write_images(tmp_path / "in", rows)
    job = job_of(tmp_path / "in", tmp_path / "out")
    ledger = Ledger(job.output)
    ledger.prepare()
    ledger.create(job, job.fingerprint("revision"), Plan(open_source(job.source), 4), "run")
    return ledger


def commit(ledger: Ledger, unit: int, seconds_ago: float = 0, run: str = "run") -> None:
    at = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    record = CommitRecord(
        unit=unit,
        part=ledger.part_name(unit),
        rows=4,
        size=1,
        sha256="",
        statuses={"ok": 3, "failed": 1},
        reasons={"decode_error": 1},
        run=run,
        committed_at=at.isoformat(timespec="seconds"),
    )
    ledger.write(f"commits/{unit:09}.json", record.to_json())


def test_a_dataset_of_which_nothing_is_done(tmp_path):
    ledger = begin(tmp_path)
    found = status(str(tmp_path / "out"))
    assert (found.planned_units, found.committed_units, found.pending_units) == (10, 0, 10)
    assert (found.rows, found.statuses, found.last_commit, found.pace) == (0, {}, None, None)
    assert (found.holder, found.alive, found.seconds_left) == (None, False, None)
    assert found.output == ledger.output


def test_a_run_that_goes_on_has_a_pace_and_an_end(tmp_path):
    ledger = begin(tmp_path)
    for unit, ago in enumerate([3000, 100, 80, 60, 40, 20]):
        commit(ledger, unit, ago)
    with Lease(ledger) as lease:
        found = status(str(tmp_path / "out"))
        assert found.holder is not None
        assert (found.holder.run, found.holder.pid, found.alive) == (lease.run, os.getpid(), True)
    assert (found.committed_units, found.rows) == (6, 24)
    assert found.statuses == {"ok": 18, "failed": 6}
    assert found.reasons == {"decode_error": 6}
    assert found.pace is not None
    # 4 units since the first one of the last ten minutes, 100 seconds ago
    assert found.pace.rows_per_second == pytest.approx(16 / 100, rel=0.05)
    assert found.seconds_left == pytest.approx(4 / (4 / 100), rel=0.05)


def test_commits_of_an_earlier_run_do_not_count_for_the_pace_of_this_one(tmp_path):
    ledger = begin(tmp_path)
    for unit, (ago, name) in enumerate([(90, "a"), (80, "a"), (30, "b"), (10, "b")]):
        commit(ledger, unit, ago, name)
    with Lease(ledger):
        found = status(str(tmp_path / "out"))
    assert found.pace is not None
    assert found.pace.rows_per_second == pytest.approx(4 / 30, rel=0.1)


def test_one_commit_in_the_last_minutes_makes_no_pace(tmp_path):
    ledger = begin(tmp_path)
    for unit, ago in enumerate([5000, 4000, 500]):
        commit(ledger, unit, ago)
    with Lease(ledger):
        found = status(str(tmp_path / "out"))
    assert found.alive
    assert found.pace is None
    assert found.seconds_left is None


@pytest.mark.parametrize(
    ("machine", "age", "alive"), [("elsewhere", 5, True), ("elsewhere", 3600, False)]
)
def test_a_run_on_another_machine_is_alive_as_long_as_its_lease_beats(
    tmp_path, machine, age, alive
):
    ledger = begin(tmp_path)
    commit(ledger, 0, age)
    holder = {"run": "r", "host": "h", "machine": machine, "pid": 1, "started": "1"}
    ledger.write("lease.json", json.dumps({**holder, "refreshed_at": time.time() - age}).encode())
    found = status(str(tmp_path / "out"))
    assert found.holder is not None
    assert found.holder.age == pytest.approx(age, abs=5)
    assert found.alive is alive


def test_a_run_that_died_on_this_machine_is_not_alive_though_its_lease_is_fresh(tmp_path):
    ledger = begin(tmp_path)
    with Lease(ledger):
        stale = json.loads(ledger.read("lease.json"))
    ledger.write("lease.json", json.dumps({**stale, "started": "before"}).encode())
    found = status(str(tmp_path / "out"))
    assert found.holder is not None
    assert not found.alive


def test_a_finished_dataset_says_so(tmp_path):
    write_images(tmp_path / "in", 10)
    run(job_of(tmp_path / "in", tmp_path / "out"))
    found = status(str(tmp_path / "out"))
    assert (found.planned_units, found.pending_units, found.rows) == (3, 0, 10)
    assert found.statuses == {"ok": 10}
    assert found.exact
    assert found.holder is None


def test_a_run_that_still_lists_its_source_is_seen(tmp_path):
    ledger = Ledger(str(tmp_path / "out"))
    ledger.prepare()
    with Lease(ledger):
        found = status(str(tmp_path / "out"))
    assert found.planned_units is None
    assert found.alive


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no dataset"):
        status(str(tmp_path / "nothing"))


def test_a_damaged_record_is_named(tmp_path):
    ledger = begin(tmp_path)
    ledger.write("commits/000000003.json", b"{")
    with pytest.raises(LedgerError, match=r"000000003\.json"):
        status(str(tmp_path / "out"))


def test_nothing_is_written(tmp_path):
    ledger = begin(tmp_path)
    commit(ledger, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status(str(tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_of_a_million_units_only_a_sample_is_read(tmp_path, monkeypatch):
    ledger = begin(tmp_path)
    commit(ledger, 9, 60)
    units = 1_000_000
    record = ledger.record(9)
    now = datetime.now(UTC)
    reads = []

    def read(self, unit: int) -> CommitRecord:
        reads.append(unit)
        at = now - timedelta(seconds=units - unit)
        failed = unit % 10 == 0
        return replace(
            record,
            unit=unit,
            statuses={"failed": 4} if failed else {"ok": 4},
            committed_at=at.isoformat(timespec="seconds"),
        )

    monkeypatch.setattr(Ledger, "record", read)
    monkeypatch.setattr(Ledger, "committed", lambda self: np.ones(units, bool))
    started = time.monotonic()
    found = status(str(tmp_path / "out"))
    assert time.monotonic() - started < 5
    assert len(reads) == found.records + status_module.NEWEST == 2500
    assert not found.exact
    assert found.rows == 4 * units
    assert found.statuses["failed"] == pytest.approx(0.1 * 4 * units, rel=0.2)
    assert found.pace is not None
    assert found.pace.rows_per_second == pytest.approx(4, rel=0.01)


def test_a_dataset_in_a_bucket_is_read_from_any_machine(s3, server):  # noqa: F811
    for i in range(6):
        s3.put_object(Bucket="data", Key=f"in/{i}.jpg", Body=b"x")
    run(job_of("s3://data/in", "s3://out/o", endpoint_url=server))
    found = status("s3://out/o", server)
    assert (found.planned_units, found.committed_units, found.rows) == (2, 2, 6)
