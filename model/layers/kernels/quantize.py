"""Rows of activations for the wide products: gathered, or int8 with a scale for each row.

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
    left = 1 << (width.bit_length() - 1)
    if rows:
        _round_rows_to_int8[(rows,)](
            x_TK, x_TK if rows_R is None else rows_R, data_RK, scale_R, width,
            CHOICES=choices, GATHERED=rows_R is not None, LEFT=left,
            RIGHT=max(16, triton.next_power_of_2(width - left)), num_warps=8,
        )  # fmt: skip
    return data_RK, scale_R


def gather_rows(x_TK: Tensor, rows_R: Tensor, choices: int) -> Tensor:
    """The rows rows_R // choices of x."""
    x_RK = torch.empty(len(rows_R), x_TK.shape[1], device=x_TK.device, dtype=x_TK.dtype)
    _gather_rows[(len(rows_R),)](
        x_TK.contiguous(), rows_R, x_RK, x_TK.shape[1], CHOICES=choices,
        BLOCK=triton.next_power_of_2(x_TK.shape[1]), num_warps=8,
    )  # fmt: skip
    return x_RK


@triton.jit
def _gather_rows(x, rows, out, K, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = (tl.load(rows + row) // CHOICES).to(tl.int64)
    k = tl.arange(0, BLOCK)
    tl.store(out + row * K + k, tl.load(x + source * K + k, mask=k < K), mask=k < K)


@triton.jit
def _round_rows_to_int8(
    x, rows, data, scale, K, CHOICES: tl.constexpr, GATHERED: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """A row is LEFT columns and up to RIGHT more, both powers of two: 9216 are not 16384."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if GATHERED:
        source = (tl.load(rows + row) // CHOICES).to(tl.int64)
    k = tl.arange(0, LEFT)
    r = LEFT + tl.arange(0, RIGHT)
    left = tl.load(x + source * K + k).to(tl.float32)
    right = tl.load(x + source * K + r, mask=r < K, other=0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(left), 0), tl.max(tl.abs(right), 0))
    # A row of zeros has no levels, and 127 / 0 is not a number.
    levels = tl.where(most == 0, 0.0, tl.div_rn(127.0, most))
    tl.store(data + row * K + k, libdevice.rint(left * levels).to(tl.int8))
    tl.store(data + row * K + r, libdevice.rint(right * levels).to(tl.int8), mask=r < K)
    tl.store(scale + row, tl.div_rn(most, 127.0))
