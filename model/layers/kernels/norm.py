"""RMS norms over rows, fused with what VL-01 does around them. T tokens, D width; sums in fp32."""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight -> bf16 [T, D]."""
    return _launch(x_TD, x_TD, weight_D, eps)


def residual_norm(
    x_TD: Tensor, y_TD: Tensor, alpha: float, beta: float, weight_D: Tensor, eps: float
) -> Tensor:
    """norm(alpha * x + beta * y): a residual and the next norm. VL-01 keeps only the normed sum."""
    return _launch(x_TD, y_TD, weight_D, eps, alpha, beta, RESIDUAL=True)


def gated_norm(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """norm(x) * sigmoid(gate), lightning attention's output before its projection."""
    return _launch(x_TD, gate_TD, weight_D, eps, GATED=True)


def _launch(x_TD, other_TD, weight_D, eps, alpha=1.0, beta=1.0, RESIDUAL=False, GATED=False):
    x_TD, other_TD = x_TD.contiguous(), other_TD.contiguous()
    tokens, width = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    if tokens:
        _norm[(tokens,)](
            x_TD, other_TD, weight_D, out_TD, width, alpha, beta, eps,
            BLOCK=triton.next_power_of_2(width), RESIDUAL=RESIDUAL, GATED=GATED, num_warps=8,
        )  # fmt: skip
    return out_TD


@triton.jit
def _norm(
    x, other, weight, out, D, alpha, beta, eps,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK)
    live = d < D
    row = tl.program_id(0).to(tl.int64) * D
    value = tl.load(x + row + d, mask=live, other=0.0).to(tl.float32)
    if RESIDUAL:
        value = alpha * value + beta * tl.load(other + row + d, mask=live, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value = value * tl.load(weight + d, mask=live, other=0.0).to(tl.float32)
    if GATED:
        value = value * tl.sigmoid(tl.load(other + row + d, mask=live, other=0.0).to(tl.float32))
    tl.store(out + row + d, value.to(out.dtype.element_ty), mask=live)
