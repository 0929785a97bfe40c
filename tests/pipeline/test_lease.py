"""Two drivers never write to one output, and a dead one does not keep it."""

import json
import os
import subprocess
import time

import pytest

from pipeline import lease
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from schemas.errors import LedgerError


@pytest.fixture
def ledger(tmp_path, monkeypatch) -> Ledger:
    monkeypatch.setattr(lease, "_SETTLE_S", 0.01)
    ledger = Ledger(str(tmp_path / "out"))
    ledger.prepare()
    return ledger


def stored(ledger: Ledger) -> dict:
    return json.loads(ledger.read("lease.json"))


def store(ledger: Ledger, **changes) -> None:
    """The lease of a run that was not ended, with changes."""
    with Lease(ledger):
        holder = stored(ledger)
    ledger.write("lease.json", json.dumps(holder | {"run": "theirs"} | changes).encode())


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_second_driver_is_refused_and_told_who_the_first_is(ledger):
    with Lease(ledger), pytest.raises(LedgerError) as error, Lease(ledger):
        pytest.fail("two drivers at once")
    assert f"process {os.getpid()} on {stored_host()}" in str(error.value)
    assert "alive 0 s ago" in str(error.value)


def stored_host() -> str:
    return os.uname().nodename


def test_a_released_lease_can_be_taken(ledger):
    with Lease(ledger):
        pass
    with Lease(ledger) as second:
        second.check()


def test_a_dead_process_of_this_machine_gives_way_at_once(ledger):
    store(ledger, pid=dead_pid())
    began = time.monotonic()
    with Lease(ledger) as second:
        second.check()
    assert time.monotonic() - began < 5


def test_a_new_process_with_the_old_id_is_not_taken_for_the_holder(ledger):
    store(ledger, started="1")
    with Lease(ledger) as second:
        second.check()


def test_a_process_that_was_killed_but_not_reaped_gives_way(ledger):
    process = subprocess.Popen(["sleep", "60"])
    store(ledger, pid=process.pid, started=lease._started(process.pid))
    with pytest.raises(LedgerError, match=f"process {process.pid} "), Lease(ledger):
        pass
    process.kill()
    time.sleep(0.1)
    with Lease(ledger) as second:
        second.check()
    process.wait()


def test_a_driver_elsewhere_keeps_its_lease_while_it_beats(ledger):
    store(ledger, machine="elsewhere", host="other-host")
    with pytest.raises(LedgerError, match="on other-host"), Lease(ledger):
        pass


def test_a_driver_elsewhere_that_stopped_beating_gives_way(ledger):
    store(ledger, machine="elsewhere", pid=1, refreshed_at=time.time() - 100)
    with Lease(ledger, refresh_s=0.05) as second:
        second.check()


def test_a_driver_whose_clock_is_behind_is_not_taken_for_dead(ledger, monkeypatch):
    store(ledger, machine="elsewhere", refreshed_at=time.time() - 100)
    holder = stored(ledger)

    def beat_meanwhile(_):
        ledger.write("lease.json", json.dumps(holder | {"beat": holder["beat"] + 1}).encode())

    monkeypatch.setattr(lease.time, "sleep", beat_meanwhile)
    with pytest.raises(LedgerError, match="another run is writing"), Lease(ledger):
        pass


def test_a_lease_is_refreshed_while_it_is_held(ledger):
    with Lease(ledger, refresh_s=0.02):
        first = stored(ledger)
        time.sleep(0.3)
        assert stored(ledger)["beat"] > first["beat"] + 2
        assert stored(ledger)["refreshed_at"] > first["refreshed_at"]


def test_two_drivers_that_start_at_once_do_not_both_win(ledger, monkeypatch):
    holder = {}

    def other_writes_meanwhile(_):
        ledger.write("lease.json", json.dumps(holder | {"run": "theirs"}).encode())

    with Lease(ledger):
        holder = stored(ledger)
    monkeypatch.setattr(lease.time, "sleep", other_writes_meanwhile)
    with pytest.raises(LedgerError, match="taken over by run theirs"), Lease(ledger):
        pass


def test_a_driver_that_lost_its_lease_stops_and_does_not_take_it_back(ledger):
    with Lease(ledger, refresh_s=0.02) as first:
        ledger.write("lease.json", json.dumps(stored(ledger) | {"run": "theirs"}).encode())
        time.sleep(0.1)
        with pytest.raises(LedgerError, match="taken over by run theirs"):
            first.check()
    assert stored(ledger)["run"] == "theirs"


def test_a_storage_that_sleeps_for_a_moment_costs_no_lease(ledger, monkeypatch):
    with Lease(ledger, refresh_s=0.02) as held:
        with monkeypatch.context() as asleep:
            asleep.setattr(Ledger, "write", lambda *_: (_ for _ in ()).throw(OSError("asleep")))
            time.sleep(0.1)
        beat = stored(ledger)["beat"]
        time.sleep(0.2)
        assert stored(ledger)["beat"] > beat
        held.check()


def test_a_damaged_lease_is_not_guessed_at(ledger):
    ledger.write("lease.json", b"{")
    with pytest.raises(LedgerError, match="remove it"), Lease(ledger):
        pass
