"""Which code computes a layer: the Triton kernels where they fit, plain PyTorch elsewhere.

Triton is imported on first use, so that machines without a GPU need not have it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

# VL01_PLAIN=1 computes everything by the plain code, also in the processes of ranks.
_plain = os.environ.get("VL01_PLAIN") == "1"

# What a tile of the matrix kernels divides, and the head sizes the attention kernels are tested on.
_WIDTH_MULTIPLE = 32
_HEAD_SIZES = (32, 64, 128)


def kernels(x: Tensor) -> ModuleType | None:
    """The kernels, if the activations `x` are what they take: bf16 on a Hopper GPU. They have no
    derivative, so what is trained is left to the plain code."""
    return _imported() if _take(x.dtype, x.device) and not x.requires_grad else None


def _take(dtype: torch.dtype, device: torch.device) -> bool:
    return not _plain and dtype == torch.bfloat16 and _is_hopper(device)


@cache
def _is_hopper(device: torch.device) -> bool:
    """The kernels are built on wgmma, which no other generation has."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _imported() -> ModuleType:
    from model.layers import kernels

    return kernels


def product_kernels(x: Tensor, *widths: int) -> ModuleType | None:
    """`kernels` for products that sum over so many columns."""
    return None if any(width % _WIDTH_MULTIPLE for width in widths) else kernels(x)


def attention_kernels(q_THD: Tensor) -> ModuleType | None:
    """`kernels` for attention with heads of this size."""
    return kernels(q_THD) if q_THD.shape[-1] in _HEAD_SIZES else None


def packs_states(dtype: torch.dtype, device: torch.device, head_size: int) -> bool:
    """Will kernels read and write the states of layers like these?"""
    return _take(dtype, device) and head_size in _HEAD_SIZES


def launches_alone(hidden_TD: Tensor, head_size: int, *widths: int) -> bool:
    """Does the host only launch kernels for layers of these sizes, none of which it waits for?"""
    return head_size in _HEAD_SIZES and product_kernels(hidden_TD, *widths) is not None


def logits_kernels(logits_NV: Tensor) -> ModuleType | None:
    """The kernels that take logits, which are fp32 and contiguous."""
    return None if _plain or not _is_hopper(logits_NV.device) else _imported()


@contextmanager
def plain_layers() -> Iterator[None]:
    """Compute everything inside by the plain code, for comparisons."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before
