"""Elementwise functions.

torch's own CPU versions take another path for the last elements of a tensor, so the same element
may differ in its last bit with the size of the batch. `exp` and `erf` do not; these use them.
In training, torch's own: autograd cannot go back through what is changed in place.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), any shape."""
    if x.is_cuda or x.requires_grad:
        return torch.sigmoid(x)
    return x.neg().exp_().add_(1).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), any shape."""
    if x.is_cuda or x.requires_grad:
        return functional.silu(x)
    denominator = x.neg().exp_().add_(1)
    return torch.div(x, denominator, out=denominator)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), the exact form (not quick_gelu, not the tanh form), any shape."""
    if x.is_cuda or x.requires_grad:
        return functional.gelu(x)
    return torch.erf(x * (1 / math.sqrt(2))).add_(1).mul_(0.5).mul_(x)
