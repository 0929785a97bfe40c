"""The share of time in which a rank computes is neither made up nor forgotten."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.engine.busy import BusyClock


def test_only_what_is_computed_counts():
    clock = BusyClock(torch.device("cpu"))
    with clock.computing():
        time.sleep(0.05)
    time.sleep(1)
    with clock.computing():
        time.sleep(0.05)
    assert 0.1 <= clock.seconds < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_busy_while_the_host_is_not():
    clock = BusyClock(torch.device("cuda"))
    x = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    with clock.computing():
        for _ in range(20):
            torch.mm(x, x)
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    assert launched < clock.seconds <= time.perf_counter() - started


class Current(threading.local):
    """The GPU of a thread, as CUDA has it: 0 unless it is put elsewhere."""

    device = 0


def test_the_thread_that_answers_for_a_rank_leaves_no_context_on_the_gpu_of_rank_0(monkeypatch):
    current, asked = Current(), []

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            pass

        def query(self):
            asked.append(current.device)
            return True

        def elapsed_time(self, _):
            return 500.0

    class Device:
        def __init__(self, device):
            self._other = device.index

        def __enter__(self):
            current.device, self._other = self._other, current.device

        def __exit__(self, *_):
            current.device, self._other = self._other, current.device

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    clock = BusyClock(torch.device("cuda", 3))
    with clock.computing():
        pass
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: clock.device_computes).result() is False
        assert other.submit(lambda: clock.seconds).result() == 0.5
        assert other.submit(lambda: current.device).result() == 0
    assert set(asked) == {3}


ON_THE_SECOND_GPU = """
import threading, torch
from model.engine.busy import BusyClock

device = torch.device("cuda", 1)
torch.cuda.set_device(device)
clock, x = BusyClock(device), torch.ones(9, device=device)
with clock.computing():
    x += 1

def ask():
    clock.device_computes
    while not clock.finished:
        pass

thread = threading.Thread(target=ask)
thread.start()
thread.join()
assert torch._C._cuda_hasPrimaryContext(1)
assert not torch._C._cuda_hasPrimaryContext(0)
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_rank_on_the_second_gpu_has_no_context_on_the_first():
    subprocess.run([sys.executable, "-c", ON_THE_SECOND_GPU], check=True)
