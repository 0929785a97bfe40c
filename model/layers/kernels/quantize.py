"""Activations to int8, one scale for each row; the fused twin of linear.py's quantize_rows.

T rows, K columns; R rows of x gathered for the experts.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


def quantize_rows(
    x_TK: Tensor, rows_R: Tensor | None = None, choices: int = 1
) -> tuple[Tensor, Tensor]:
    """int8 [R, K] and fp32 scales [R] of the rows rows_R // choices of x, of all by default."""
    x_TK = x_TK.contiguous()
    width = x_TK.shape[1]
    rows = len(x_TK) if rows_R is None else len(rows_R)
    data_RK = torch.empty(rows, width, device=x_TK.device, dtype=torch.int8)
    scale_R = torch.empty(rows, device=x_TK.device, dtype=torch.float32)
    if rows:
        _round_rows_to_int8[(rows,)](
            x_TK, x_TK if rows_R is None else rows_R, data_RK, scale_R, width,
            CHOICES=choices, GATHERED=rows_R is not None, BLOCK=triton.next_power_of_2(width),
            num_warps=8,
        )  # fmt: skip
    return data_RK, scale_R


@triton.jit
def _round_rows_to_int8(
    x, rows, data, scale, K, CHOICES: tl.constexpr, GATHERED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    source = row
    if GATHERED:
        source = (tl.load(rows + row) // CHOICES).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = tl.load(x + source * K + k, mask=k < K, other=0.0).to(tl.float32)
    step = tl.max(tl.abs(value), 0) / 127.0
    # A row of zeros has the scale 0, and 0 / 0 is not a number.
    level = libdevice.rint(tl.div_rn(value, tl.where(step == 0, 1.0, step)))
    tl.store(data + row * K + k, level.to(tl.int8), mask=k < K)
    tl.store(scale + row, step)
