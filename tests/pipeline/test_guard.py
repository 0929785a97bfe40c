"""A process that is stopped, or in which no thread runs any more, is killed; a busy one is not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

PATIENCE = 2
KILLED_WITHIN = 20.0  # on a busy machine

PROGRAM = f"""
import ctypes, sys, time
from pipeline.guard import guard

started = time.monotonic()
guard({PATIENCE}, lambda: sys.argv[1] != "unwell" or time.monotonic() - started < {PATIENCE})
print("guarded", flush=True)
doing, seconds = sys.argv[1], float(sys.argv[2])
until = time.monotonic() + seconds
if doing == "holding the lock of Python":
    ctypes.PyDLL(None).sleep(int(seconds))
elif doing == "in a call that lets others run":
    ctypes.CDLL(None).sleep(int(seconds))
while doing in ("busy", "unwell") and time.monotonic() < until:
    sum(range(1000))
"""


def start(doing: str, seconds: float) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", PROGRAM, doing, str(seconds)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "guarded\n"
        yield process
        process.kill()


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    """A guarded one that waits."""
    yield from start("in a call that lets others run", 60)


def said(process: subprocess.Popen) -> str:
    assert process.stderr
    return process.stderr.read()


def guard_of(process: subprocess.Popen) -> psutil.Process:
    (child,) = psutil.Process(process.pid).children()
    return child


def test_a_stopped_process_is_killed_and_its_guard_ends_with_it(process):
    child = guard_of(process)
    stopped = time.monotonic()
    os.kill(process.pid, signal.SIGSTOP)
    assert process.wait(KILLED_WITHIN) == -signal.SIGKILL
    assert time.monotonic() - stopped > PATIENCE - 1
    child.wait(5)
    assert f"process {process.pid} has given no sign for" in said(process)


def test_a_call_that_lets_no_thread_run_is_a_hang():
    for process in start("holding the lock of Python", 60):
        assert process.wait(KILLED_WITHIN) == -signal.SIGKILL


def test_a_process_that_does_not_call_itself_well_any_more_is_killed():
    started = time.monotonic()
    for process in start("unwell", 60):
        assert process.wait(KILLED_WITHIN) == -signal.SIGKILL
        assert time.monotonic() - started > PATIENCE


@pytest.mark.parametrize("doing", ["busy", "in a call that lets others run"])
def test_a_process_that_is_only_slow_goes_on(doing):
    for process in start(doing, 3 * PATIENCE):
        assert process.wait(30) == 0, said(process)


def test_a_run_that_its_user_halts_and_continues_goes_on(process):
    os.killpg(process.pid, signal.SIGSTOP)  # as Ctrl-Z does
    time.sleep(2 * PATIENCE + 1)
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(PATIENCE)
    assert process.poll() is None


def test_nothing_is_left_of_the_guard_of_a_process_that_was_killed(process):
    child = guard_of(process)
    process.kill()
    process.wait()
    child.wait(5)
    assert not child.is_running()
