"""Triton kernels for CUDA devices. Import it only where there is one: Triton may be missing."""

from model.layers.kernels.experts import experts
from model.layers.kernels.lightning_attention import lightning_attention
from model.layers.kernels.linear import int8_linear
from model.layers.kernels.mask import mask_logits
from model.layers.kernels.norm import gated_norm, residual_norm, rms_norm
from model.layers.kernels.rotary import rotary
from model.layers.kernels.route import route
from model.layers.kernels.softmax_attention import paged_attention

__all__ = [
    "experts",
    "gated_norm",
    "int8_linear",
    "lightning_attention",
    "mask_logits",
    "paged_attention",
    "residual_norm",
    "rms_norm",
    "rotary",
    "route",
]
