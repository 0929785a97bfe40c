"""A run that is told to stop, or sees that it goes wrong, ends soon and loses nothing."""

import os
import re
import signal
import subprocess
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from fsspec.implementations.local import LocalFileSystem

import pipeline.retry
import pipeline.run
from model.nano.random_checkpoint import write_random_checkpoint
from pipeline import documents, lease, sources
from pipeline.ledger import Ledger
from pipeline.read import read_units
from pipeline.retry import Choice
from pipeline.stop import Stop
from pipeline.verify import verify
from schemas.errors import StoppedError
from tests import test_end_to_end as real
from tests.images import good_images
from tests.pipeline.fake_run import generated, job_of, write_images


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)


def tell(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# The signal alone


def test_units_begun_are_finished_and_no_others():
    open_units = {0, 1}

    def tables():
        yield "begun"
        tell()
        yield "more of 0 and 1"
        open_units.clear()
        open_units.add(2)
        yield "the rest of 0 and 1, more of 2"
        pytest.fail("asked for more than it needs")

    told = []
    with Stop(grace_seconds=30, asked=told.append) as stop:
        seen = list(stop.relay(tables(), lambda: open_units))
    assert stop.asked == "SIGTERM"
    assert told == [30]
    assert seen == ["begun", "more of 0 and 1", "the rest of 0 and 1, more of 2"]


def test_the_wait_for_rows_that_do_not_come_ends_with_the_grace():
    def tables():
        yield "begun"
        tell(signal.SIGINT)
        time.sleep(60)

    started = time.monotonic()
    with Stop(grace_seconds=0.3) as stop:
        assert list(stop.relay(tables(), lambda: {0})) == ["begun"]
    assert 0.3 <= time.monotonic() - started < 10


def test_nobody_waits_while_nothing_is_begun():
    def tables():
        tell()
        time.sleep(60)
        yield "the model is loaded"

    started, told = time.monotonic(), []
    with Stop(grace_seconds=25, asked=told.append) as stop:
        assert list(stop.relay(tables(), set)) == []
    assert time.monotonic() - started < 10
    assert told == [0]


def test_a_commit_is_not_cut_in_two_by_the_end_of_the_grace():
    committed = []
    with Stop(grace_seconds=0.1) as stop:
        for table in stop.relay(iter("abc"), lambda: {0}):
            tell()
            time.sleep(0.5)  # the grace is over in the middle of this
            committed.append(table)
    assert committed == ["a"]


def test_a_second_signal_stops_at_once():
    def tables():
        yield "begun"
        tell(signal.SIGINT)
        tell(signal.SIGINT)
        time.sleep(60)

    with Stop(grace_seconds=25) as stop, pytest.raises(KeyboardInterrupt):
        list(stop.relay(tables(), lambda: {0}))


def test_a_signal_before_the_work_began_stops_at_once_and_ours_are_put_back():
    before, told = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(StoppedError, match="stopped by SIGTERM"), Stop(25, told.append):
        tell()
    assert told == [0]
    assert signal.getsignal(signal.SIGTERM) is before


# The run around it, with the flow of fake_run


@pytest.fixture
def flow(monkeypatch):
    """`events`: what happens after so many tables."""
    events = {}

    def answers(self, pending: pa.Table):
        for count, rows in enumerate(read_units(pending, self.read)):
            yield generated(rows)
            events.get(count, lambda: None)()

    class Place:
        gpus, hosts = 0, None

        def __getattr__(self, _):
            return lambda: None

    monkeypatch.setattr(pipeline.run.Flow, "generated", answers)
    model = SimpleNamespace(page_settings=lambda _: None)
    for module in (pipeline.run, pipeline.retry):
        monkeypatch.setattr(module, "open_model", lambda _: model)
        monkeypatch.setattr(module, "model_revision", lambda _: "revision")
    monkeypatch.setattr(pipeline.run, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(pipeline.run, "place", lambda *_: Place())
    book = SimpleNamespace(
        shared=lambda: None, news=lambda at_once=False: [], restarts=0, starting=lambda: ""
    )
    monkeypatch.setattr(pipeline.run, "RunBook", lambda _: book)
    return events


def committed(output) -> int:
    ledger = Ledger(str(output))
    ledger.resume()
    return int(ledger.committed().sum())


def test_a_stopped_run_says_what_it_did_and_goes_on_where_it_was(tmp_path, flow):
    write_images(tmp_path / "in", 20)
    job = job_of(tmp_path / "in", tmp_path / "out")
    flow[2] = tell
    with pytest.raises(StoppedError, match=r"SIGTERM: 3 of the 5 units of this run are committed"):
        pipeline.run.run(job)
    assert committed(tmp_path / "out") == 3
    assert not (tmp_path / "out/_vl01/lease.json").exists()
    flow.clear()
    assert pipeline.run.run(job).rows == {"ok": 8}
    assert verify(str(tmp_path / "out"), deep=True).ok


def test_a_run_that_is_done_when_the_signal_comes_is_not_called_stopped(tmp_path, flow):
    write_images(tmp_path / "in", 8)
    flow[1] = tell
    assert pipeline.run.run(job_of(tmp_path / "in", tmp_path / "out")).rows == {"ok": 8}


def test_a_run_in_which_most_rows_fail_stops_and_tells_the_commonest_reasons(tmp_path, flow):
    source, output = tmp_path / "in", tmp_path / "out"
    write_images(source, 400)
    for i in range(0, 400, 4):
        (source / f"{i:04}.jpg").write_bytes(b"x" * 1001)
    job = job_of(source, output, max_bytes=1000)
    with pytest.raises(StoppedError) as error:
        pipeline.run.run(job)
    assert "50 of the first 200 rows failed, more than --max-failure-rate 0.2" in str(error.value)
    assert "50 too_many_bytes" in str(error.value)
    assert committed(output) == 50
    summary = pipeline.run.run(job.model_copy(update={"max_failure_rate": 0.25}))
    assert summary.rows == {"ok": 150, "failed": 50}
    assert verify(str(output), deep=True).ok


@pytest.mark.parametrize("where", ["listing", "storage", "foretelling", "joining"])
def test_a_signal_is_not_taken_for_an_error_of_what_it_meets(tmp_path, flow, monkeypatch, where):
    """A listing takes minutes, and a wrong configuration is not tried again by who started it."""
    write_images(tmp_path / "in", 8)
    job = job_of(tmp_path / "in", tmp_path / "out", documents=True)
    started = time.monotonic()
    module, name = {
        "listing": (sources, "list_files"),
        "storage": (LocalFileSystem, "cat_file"),
        "foretelling": (pipeline.run, "foretold"),
        "joining": (documents, "_committed"),
    }[where]
    real_one = getattr(module, name)

    def told(*given, **more):
        if lease_of(tmp_path / "out"):
            monkeypatch.setattr(module, name, real_one)
            tell()
            pytest.fail("went on")
        return real_one(*given, **more)

    monkeypatch.setattr(module, name, told)
    with pytest.raises(StoppedError, match=r"^stopped by SIGTERM; the same command does what is"):
        pipeline.run.run(job)
    assert time.monotonic() - started < 10
    assert not lease_of(tmp_path / "out")
    assert pipeline.run.run(job).units == 2
    assert verify(str(tmp_path / "out"), deep=True).ok


def lease_of(output) -> bool:
    return (output / "_vl01/lease.json").exists()


def test_few_failures_or_few_rows_stop_no_run(tmp_path, flow):
    write_images(tmp_path / "few", 12)
    write_images(tmp_path / "many", 400)
    for i in range(12):
        (tmp_path / "few" / f"{i:04}.jpg").write_bytes(b"x" * 1001)
        (tmp_path / "many" / f"{i:04}.jpg").write_bytes(b"x" * 1001)
    for name in ("few", "many"):
        job = job_of(tmp_path / name, tmp_path / f"out-{name}", max_bytes=1000)
        assert pipeline.run.run(job).rows["failed"] == 12


def test_a_stopped_retry_keeps_what_it_replaced_and_goes_on(tmp_path, flow):
    source, output = tmp_path / "in", tmp_path / "out"
    write_images(source, 400)
    for i in range(400):
        (source / f"{i:04}.jpg").write_bytes(b"x" * 1001)
    job = job_of(source, output, max_bytes=1000, max_failure_rate=1.0)
    pipeline.run.run(job)
    write_images(source, 40)
    choice = Choice(frozenset({"failed"}))
    flow[4] = tell
    with pytest.raises(StoppedError, match="5 of the 100 units"):
        pipeline.retry.retry(job, choice)
    assert verify(str(output), deep=True).statuses == {"ok": 20, "failed": 380}
    flow.clear()
    summary = pipeline.retry.retry(job.model_copy(update={"max_failure_rate": 0.2}), choice)
    assert summary.rows == {"ok": 20, "failed": 360}
    assert verify(str(output), deep=True).statuses == {"ok": 40, "failed": 360}


# The real thing


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_told_to_stop_ends_within_30_s_and_its_successor_does_the_rest(tmp_path):
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tile=56)
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, data in good_images(80):
        (source / f"{name}.jpg").write_bytes(data)
    arguments = real.caption(source, output, checkpoint)
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    real.wait_for(lambda: len(real.records(output)) >= 2, process)
    told = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all processes of the terminal
    _, shown = process.communicate(timeout=60)
    assert time.monotonic() - told < 30
    assert process.returncode == 1, shown
    assert re.search(r"vl01: stopped by SIGINT: \d+ of the 10 units", shown), shown
    assert "Traceback" not in shown
    assert 2 <= len(real.records(output)) < 10
    assert len(list(output.glob("part-*"))) == len(real.records(output))
    assert not (output / "_vl01/lease.json").exists()

    real.run(arguments)
    rows = ds.dataset(output, format="parquet").to_table()["row_id"].to_pylist()
    assert len(rows) == len(set(rows)) == 80
    real.run(real.command("verify", output, "--deep"))
