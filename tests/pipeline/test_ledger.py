"""A run can stop anywhere and be started again; another job is refused; a reader can read OUT."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline import lease
from pipeline import ledger as ledger_module
from pipeline.ledger import Ledger
from pipeline.plan import Plan, row_id, units_of
from pipeline.verify import verify
from schemas.errors import ConfigError, LedgerError
from schemas.ledger import Unit, UnitKind
from tests.pipeline.fake_run import job_of, run, write_images


def texts(output) -> list[str]:
    return sorted(pyarrow.dataset.dataset(str(output)).to_table()["text"].to_pylist())


def expected(count: int) -> list[str]:
    return [f"image {i}" for i in range(count)]


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)


# Stopping and starting again


class Crash(BaseException):
    """What no `except Exception` stops, as no kill is stopped."""


def crash_at(monkeypatch, moment: int) -> None:
    """Dies at one of the moments around the renames, by which every file appears."""
    replace, moments = os.replace, itertools.count()

    def dying_replace(source, target):
        if next(moments) == moment:
            raise Crash
        replace(source, target)
        if next(moments) == moment:
            raise Crash

    monkeypatch.setattr(os, "replace", dying_replace)


def test_a_plan_that_the_disk_has_no_room_for_does_not_stay_there_in_part(tmp_path, monkeypatch):
    def full(plan: Plan, folder: Path):
        (folder / "plan.parquet").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_module, "write_plan", full)
    write_images(tmp_path / "in", 10)
    with pytest.raises(OSError, match="No space left"):
        run(job_of(tmp_path / "in", tmp_path / "out"))
    assert list((tmp_path / "out/_vl01/tmp").iterdir()) == []


def test_a_crash_at_any_write_loses_no_row_and_doubles_none(tmp_path):
    write_images(tmp_path / "in", 10)
    crashes = 0
    for moment in itertools.count():
        output = tmp_path / f"out-{moment}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_at(monkeypatch, moment)
            try:
                run(job_of(tmp_path / "in", output))
                break
            except Crash:
                crashes += 1
        run(job_of(tmp_path / "in", output))
        assert texts(output) == expected(10)
        assert verify(str(output), deep=True).ok
        assert list((output / "_vl01/tmp").iterdir()) == []
    assert crashes > 2 * (1 + 1 + 1 + 2 * 3)  # lease, plan, job.json, part and record of 3 units


DRIVER = """
import os, signal, sys
from tests.pipeline.fake_run import job_of, run
replace, count = os.replace, 0
def killing_replace(source, target):
    global count
    if "part-" in str(target) or "commits" in str(target):
        count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killing_replace
run(job_of(sys.argv[1], sys.argv[2]))
"""


@pytest.mark.parametrize("kills", [[1, 2, 2]])
def test_a_killed_driver_is_followed_by_the_next(tmp_path, kills):
    """Killed before its first part, before its first record, and again: its lease is dead too."""
    write_images(tmp_path / "in", 10)
    output = tmp_path / "out"
    for kill in kills:
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "in"), str(output), str(kill)]
        process = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
        assert process.returncode == -signal.SIGKILL
    assert (output / "part-000000000.parquet").exists()
    assert not verify(str(output)).ok
    run(job_of(tmp_path / "in", output))
    assert texts(output) == expected(10)
    assert verify(str(output), deep=True).ok


def test_a_part_without_a_record_does_not_count(tmp_path):
    write_images(tmp_path / "in", 10)
    ledger = run(job_of(tmp_path / "in", tmp_path / "out"))
    ledger.remove("commits/000000001.json")
    (tmp_path / "out/_vl01/tmp/left-over").write_bytes(b"half")
    assert ledger.resume()
    assert ledger.committed().tolist() == [True, False, True]
    assert [u.number for table in ledger.pending() for u in units_of(table)] == [1]
    ledger.clean_up()
    assert sorted(ledger.parts()) == [0, 2]
    assert not (tmp_path / "out/_vl01/tmp/left-over").exists()


def test_a_beat_of_the_lease_while_cleaning_up_does_not_stop_the_run(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 4)
    ledger = run(job_of(tmp_path / "in", tmp_path / "out"))
    list_flat = ledger_module.list_flat

    def list_and_lose(fs, root, prefix=""):
        gone = ["renamed-meanwhile"] if root.endswith("/tmp") else []
        return iter([*gone, *list_flat(fs, root, prefix)])

    monkeypatch.setattr(ledger_module, "list_flat", list_and_lose)
    ledger.clean_up()
    assert verify(ledger.output).ok


def test_a_finished_run_does_nothing_when_started_again(tmp_path):
    write_images(tmp_path / "in", 10)
    run(job_of(tmp_path / "in", tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    run(job_of(tmp_path / "in", tmp_path / "out"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")} == before


def test_the_source_is_not_listed_again_on_resume(tmp_path):
    write_images(tmp_path / "in", 10)
    ledger = run(job_of(tmp_path / "in", tmp_path / "out"))
    ledger.remove("commits/000000002.json")
    write_images(tmp_path / "in", 30)
    run(job_of(tmp_path / "in", tmp_path / "out"))
    assert texts(tmp_path / "out") == expected(10)


def test_rows_in_any_order_make_the_same_parts(tmp_path):
    write_images(tmp_path / "in", 10)
    run(job_of(tmp_path / "in", tmp_path / "a"))
    run(job_of(tmp_path / "in", tmp_path / "b"), order=lambda tables: tables[::-1])
    for part in ("part-000000000.parquet", "part-000000002.parquet"):
        assert pq.read_table(tmp_path / "a" / part).equals(pq.read_table(tmp_path / "b" / part))


# Whose output it is


def test_another_job_is_refused_naming_the_keys_that_differ(tmp_path):
    write_images(tmp_path / "in", 4)
    run(job_of(tmp_path / "in", tmp_path / "out"))
    with pytest.raises(ConfigError) as error:
        run(job_of(tmp_path / "in", tmp_path / "out", seed=7, keep=("id",)))
    assert "seed is 0 there and 7 now" in str(error.value)
    assert 'keep is [] there and ["id"] now' in str(error.value)
    assert "prompt" not in str(error.value)


def test_settings_that_only_change_the_speed_may_change(tmp_path):
    write_images(tmp_path / "in", 4)
    run(job_of(tmp_path / "in", tmp_path / "out"))
    run(job_of(tmp_path / "in", tmp_path / "out", pp=4, strict=True))


def test_a_wrong_keep_can_be_corrected_on_the_same_output(tmp_path):
    """Nothing counts before the plan is whole, so a mistake found while planning leaves no job."""
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [b"a"], "id": [1]}), tmp_path / "in/a.parquet")
    with pytest.raises(ConfigError, match="keep label"):
        run(job_of(tmp_path / "in", tmp_path / "out", keep=("label",)))
    run(job_of(tmp_path / "in", tmp_path / "out", keep=("id",)))
    assert pyarrow.dataset.dataset(str(tmp_path / "out")).to_table()["id"].to_pylist() == [1]


def test_parquet_files_of_others_are_not_mixed_with(tmp_path):
    (tmp_path / "out/sub").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "out/sub/mine.parquet")
    with pytest.raises(ConfigError, match=r"sub/mine\.parquet"):
        Ledger(str(tmp_path / "out")).prepare()


@pytest.mark.parametrize("output", ["/proc/out", "{tmp}/file", "{tmp}/file/out"])
def test_an_output_that_cannot_be_written_is_one_clear_line(tmp_path, output):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write to") as error:
        Ledger(output.format(tmp=tmp_path)).prepare()
    assert output.format(tmp=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_newer_layout_is_not_read_as_this_one(tmp_path):
    write_images(tmp_path / "in", 4)
    run(job_of(tmp_path / "in", tmp_path / "out"))
    path = tmp_path / "out/_vl01/job.json"
    path.write_text(path.read_text().replace('"layout": 2', '"layout": 3'))
    with pytest.raises(ConfigError, match="layout 3"):
        Ledger(str(tmp_path / "out")).resume()


def test_a_damaged_ledger_stops_the_run(tmp_path):
    write_images(tmp_path / "in", 4)
    run(job_of(tmp_path / "in", tmp_path / "out"))
    (tmp_path / "out/_vl01/plan.parquet").write_bytes(b"damaged")
    with pytest.raises(LedgerError, match="plan"):
        Ledger(str(tmp_path / "out")).resume()
    (tmp_path / "out/_vl01/job.json").write_bytes(b"damaged")
    with pytest.raises(LedgerError, match=r"job\.json"):
        Ledger(str(tmp_path / "out")).resume()


# What is in OUT


def test_every_reader_sees_the_rows_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    write_images(tmp_path / "in", 10)
    output = str(tmp_path / "out")
    run(job_of(tmp_path / "in", output))
    assert texts(output) == expected(10)
    assert sorted(pandas.read_parquet(output)["text"]) == expected(10)
    assert sorted(pq.read_table(output)["text"].to_pylist()) == expected(10)
    loaded = datasets.load_dataset(output, cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["train"]["text"]) == expected(10)  # type: ignore[index]


def test_a_part_tells_where_it_is_from(tmp_path):
    write_images(tmp_path / "in", 4)
    run(job_of(tmp_path / "in", tmp_path / "out"))
    parquet = pq.ParquetFile(tmp_path / "out/part-000000000.parquet")
    metadata = parquet.metadata.metadata
    assert json.loads(metadata[b"vl01.fingerprint"])["prompt"] == "?"
    assert metadata[b"vl01.model"] == b"/nano"
    assert metadata[b"vl01.quantization"] == b"int8"
    assert metadata[b"vl01.random_weights"] == b"false"
    assert metadata[b"vl01.version"]
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
    assert parquet.read(["row_id"])["row_id"][0].as_py() == row_id("0000.jpg")


def test_random_weights_never_pass_for_the_model(tmp_path):
    write_images(tmp_path / "in", 4)
    run(job_of(tmp_path / "in", tmp_path / "out", random_weights=True))
    metadata = pq.ParquetFile(tmp_path / "out/part-000000000.parquet").metadata.metadata
    assert metadata[b"vl01.random_weights"] == b"true"
    with pytest.raises(ConfigError, match="random_weights is true there and false now"):
        run(job_of(tmp_path / "in", tmp_path / "out"))


# Size


class ManyUnits(Plan):
    """A plan of many tar shards."""

    def __init__(self) -> None:
        pass

    def files(self):
        return iter([])

    def units(self, files=None, first=0):
        for i in range(100_000):
            yield Unit(i, UnitKind.TAR, (f"shards/shard-{i:07}.tar",))

    def kept(self) -> pa.Schema:
        return pa.schema([])


def test_many_units_are_planned_and_resumed_without_reading_their_records(tmp_path, monkeypatch):
    ledger = Ledger(str(tmp_path / "out"))
    ledger.prepare()
    job = job_of(tmp_path, tmp_path / "out")
    ledger.create(job, {}, ManyUnits(), "run")
    names = [f"{i:09}.json" for i in range(99_000)]
    monkeypatch.setattr("pipeline.ledger.list_flat", lambda *_: iter(names))
    monkeypatch.setattr(Ledger, "record", lambda *_: pytest.fail("read a record"))
    again = Ledger(str(tmp_path / "out"))
    assert again.resume({})
    tracemalloc.start()
    pending = np.concatenate([table["unit"].to_numpy() for table in again.pending()])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pending.tolist() == list(range(99_000, 100_000))
    assert peak < 15e6
