"""Which code computes a layer."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from model.layers import dispatch


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Stands in for the kernels, which cannot be imported here."""
    module = ModuleType("model.layers.kernels")
    monkeypatch.setitem(sys.modules, "model.layers.kernels", module)
    monkeypatch.setattr("model.layers.kernels", module, raising=False)
    # GPU n is of generation n.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 0))
    dispatch._is_hopper.cache_clear()
    yield module
    dispatch._is_hopper.cache_clear()


def on_gpu(*shape: int, dtype=torch.bfloat16, generation=9, requires_grad=False):
    device = torch.device("cuda", generation)
    return SimpleNamespace(dtype=dtype, shape=shape, device=device, requires_grad=requires_grad)


def test_a_cpu_or_fp32_or_another_generation_never_takes_a_kernel(triton):
    assert dispatch.kernels(on_gpu(1, generation=8)) is None  # type: ignore[arg-type]
    assert dispatch.kernels(torch.zeros(1, dtype=torch.bfloat16)) is None
    assert dispatch.kernels(on_gpu(1, dtype=torch.float32)) is None  # type: ignore[arg-type]
    assert dispatch.kernels(on_gpu(1)) is triton  # type: ignore[arg-type]


def test_kernels_never_cut_a_gradient_off(triton):
    assert dispatch.kernels(on_gpu(1, requires_grad=True)) is None  # type: ignore[arg-type]


def test_sizes_that_no_kernel_computes_take_the_plain_code(triton):
    assert dispatch.product_kernels(on_gpu(1), 64, 96) is triton  # type: ignore[arg-type]
    assert dispatch.product_kernels(on_gpu(1), 64, 40) is None  # type: ignore[arg-type]
    assert dispatch.attention_kernels(on_gpu(5, 4, 128)) is triton  # type: ignore[arg-type]
    assert dispatch.attention_kernels(on_gpu(5, 4, 80)) is None  # type: ignore[arg-type]


def test_logits_are_fp32_and_take_the_kernels_all_the_same(triton):
    assert dispatch.logits_kernels(on_gpu(1, dtype=torch.float32)) is triton  # type: ignore[arg-type]
    assert dispatch.logits_kernels(torch.zeros(1)) is None
    assert dispatch.logits_kernels(on_gpu(1, generation=8)) is None  # type: ignore[arg-type]


def test_the_plain_code_is_forced_within_its_block_only(triton):
    with dispatch.plain_layers():
        assert dispatch.kernels(on_gpu(1)) is None  # type: ignore[arg-type]
        assert dispatch.logits_kernels(on_gpu(1)) is None  # type: ignore[arg-type]
    assert dispatch.kernels(on_gpu(1)) is triton  # type: ignore[arg-type]


def test_states_are_packed_for_those_layers_alone_whose_attention_takes_kernels(triton):
    hopper, other, cpu = torch.device("cuda", 9), torch.device("cuda", 8), torch.device("cpu")
    assert dispatch.packs_states(torch.bfloat16, hopper, 128)
    assert not dispatch.packs_states(torch.bfloat16, hopper, 80)
    assert not dispatch.packs_states(torch.float32, hopper, 128)
    assert not dispatch.packs_states(torch.bfloat16, other, 128)
    assert not dispatch.packs_states(torch.bfloat16, cpu, 128)
    with dispatch.plain_layers():
        assert not dispatch.packs_states(torch.bfloat16, hopper, 128)
