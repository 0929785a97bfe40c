"""A rank in which Triton compiles a kernel is not taken for hung, and is watched again after."""

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.engine.progress import Progress
from model.engine.vital_signs import VitalSigns, hung

NO_LAYERS: Any = SimpleNamespace(layers={}, is_first=False)


def after(progress: Progress, seconds: int) -> dict[int, str]:
    """The verdict on a rank that says the same for so long."""
    signs = VitalSigns()
    signs.heard(progress.alive())
    for _ in range(seconds):
        signs.passed(1.0)
        signs.heard(progress.alive())
    return hung([signs], patience=30)


@pytest.fixture
def runtime(monkeypatch) -> SimpleNamespace:
    """Stands for Triton's, which is not there where there is no GPU."""
    knobs = SimpleNamespace(runtime=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=knobs))
    return knobs.runtime


def test_a_rank_that_compiles_a_kernel_for_long_is_not_hung_until_it_has(runtime):
    progress = Progress()
    progress.follow(NO_LAYERS, torch.device("cuda"))
    progress.at("computing microbatch 7")
    assert after(progress, 31) == {0: "no progress for 31 s, is computing microbatch 7"}
    # Called with what is compiled, by name; only if it returns nothing is it compiled.
    assert runtime.jit_cache_hook(key="", repr="", fn=None, compile={}) is None
    assert progress.alive().doing == "compiling a kernel, computing microbatch 7"
    assert after(progress, 6000) == {}
    runtime.jit_post_compile_hook(key="", repr="", fn=None, compile={})
    assert after(progress, 31) == {0: "no progress for 31 s, is computing microbatch 7"}


def test_a_rank_on_cpu_or_without_triton_is_followed_all_the_same(runtime, monkeypatch):
    Progress().follow(NO_LAYERS, torch.device("cpu"))
    assert not vars(runtime)
    monkeypatch.setitem(sys.modules, "triton", None)
    Progress().follow(NO_LAYERS, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_says_when_it_compiles(monkeypatch, tmp_path):
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
