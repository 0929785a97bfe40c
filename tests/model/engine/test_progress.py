"""A rank in which Triton compiles a kernel is not taken for hung, and is watched again after."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.engine.messages import Alive
from model.engine.progress import Progress
from model.engine.vital_signs import VitalSigns, hung

NO_LAYERS: Any = SimpleNamespace(layers={}, is_first=False)
COMPUTES = Alive("computing microbatch 7", progress=0, waits=False, busy_seconds=0.0)


class Device:
    """A GPU, and the events of it."""

    def __init__(self, monkeypatch) -> None:
        self.begun = self.ended = False
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        self._events = 0

    def _event(self, **_: Any) -> Any:
        self._events += 1
        ends = self._events % 2 == 0
        return SimpleNamespace(
            record=lambda: None,
            query=lambda: self.ended if ends else self.begun,
            elapsed_time=lambda _: 1.0,
        )


def after(progress: Progress, seconds: int) -> dict[int, str]:
    """The verdict on a rank that says the same for so long."""
    signs = VitalSigns()
    signs.heard(progress.alive())
    for _ in range(seconds):
        signs.passed(1.0)
        signs.heard(progress.alive())
    return hung([signs], patience=30)


@contextmanager
def at_work_in(module: str, progress: Progress) -> Iterator[None]:
    """A thread that computes a microbatch, and is now in a function of this module."""
    done, there = threading.Event(), threading.Event()
    functions: dict[str, Any] = {"__name__": module, "done": done, "there": there}
    exec("def compile():\n    there.set()\n    done.wait()", functions)

    def work() -> None:
        progress.follow(NO_LAYERS, torch.device("cuda"))
        progress.at("computing microbatch 7")
        functions["compile"]()

    thread = threading.Thread(target=work)
    thread.start()
    there.wait()
    yield
    done.set()
    thread.join()


def test_a_rank_that_compiles_a_kernel_for_long_is_not_hung_until_it_has():
    progress = Progress()
    with at_work_in("triton.compiler.compiler", progress):
        assert progress.alive().doing == "compiling a kernel, computing microbatch 7"
        assert after(progress, 6000) == {}
    assert after(progress, 31) == {0: "no progress for 31 s, is computing microbatch 7"}


def test_a_rank_that_hangs_where_a_kernel_is_launched_is_hung():
    progress = Progress()
    with at_work_in("triton.runtime.jit", progress):
        assert after(progress, 31) == {0: "no progress for 31 s, is computing microbatch 7"}


def test_a_rank_that_can_launch_no_more_while_its_gpu_waits_for_a_slow_one_is_not_hung(
    monkeypatch,
):
    device, progress = Device(monkeypatch), Progress()
    clock = progress.follow(NO_LAYERS, torch.device("cuda"))
    with clock.computing():
        progress.at("computing microbatch 0")
    progress.at("computing microbatch 1")

    def verdict(slow: Alive) -> dict[int, str]:
        signs = [VitalSigns(), VitalSigns()]
        for second in range(60):
            for each, said in zip(signs, (slow, progress.alive()), strict=True):
                each.heard(replace(said, progress=second) if said is slow else said)
                each.passed(1.0)
        return hung(signs, patience=30)

    assert verdict(COMPUTES) == {}
    device.begun = True  # what it waited for came, and now a kernel of its own never ends
    assert list(verdict(COMPUTES)) == [1]
    device.begun = device.ended = True
    assert list(verdict(COMPUTES)) == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_that_triton_compiles_is_seen(monkeypatch, tmp_path):
    import triton  # pyright: ignore[reportMissingImports]

    from model.layers.kernels import linear

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    progress = Progress()
    progress.follow(NO_LAYERS, torch.device("cuda"))
    seen, done = set(), threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            seen.add(progress.alive().progress)

    thread = threading.Thread(target=look)
    thread.start()
    types = torch.float32, torch.bfloat16, torch.bfloat16
    kernel = triton.jit(linear._sum_parts.fn)
    kernel.warmup(*types, 100, 1024, SPLITS=3, BLOCK=1024, SILU=True, grid=(1,))
    done.set()
    thread.join()
    assert None in seen
    assert progress.alive().progress is not None
