"""The share of time in which a rank computes is neither made up nor forgotten."""

import time

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
