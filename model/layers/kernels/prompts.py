"""Products for prompts: tiles for `prompt_product`, and its launches.

Either x is int8 too (1,382 TFLOP/s on an H100 at 4,096 tokens), or the weight is upcast to bf16 in
registers, as wgmma's first operand (y^T = W x^T; 767, where torch's bf16 reaches 772).
T tokens, R rows (a token's choices), N rows of the weight, K columns, E experts, D hidden, F expert
width.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from model.layers.kernels.prompt_product import BYTES, SHORT, product
from model.layers.kernels.quantize import gather_rows, quantize_rows

WARPS = 8


@dataclass(frozen=True)
class Tile:
    """tokens of x by rows of the weight; shared: token tiles that share a tile of the weight while
    it is in the L2 cache; stages: steps in shared memory, as many as fit beside the output."""

    tokens: int
    rows: int
    shared: int
    stages: int


# Measured on an H100 at [9216, 6144] and with 32 experts of it (tests/gpu/bench_kernels.py). There
# are no fp8 inputs: torch's product of them, a scale a row, gets to 1,318 TFLOP/s where INT8 gets
# to 1,382, and at 16,384 tokens 1,298 against 1,295. FEW is for experts of few rows, and in decode
# for wide products: 0.092 against 0.102 ms of linear.py's at 128 tokens of [24576, 6144]. MANY
# shares by five, which has no factor in common with 132 multiprocessors: by four each of them would
# meet one place of every four tiles only, and so more or fewer short tiles (an expert's last) than
# others.
INT8 = Tile(tokens=128, rows=256, shared=16, stages=4)
FEW = Tile(tokens=128, rows=256, shared=8, stages=5)
MANY = Tile(tokens=256, rows=128, shared=5, stages=4)
# Up to so many rows an expert. Of neighbours at 24: 2.06 and 2.10 ms; at 32: 2.48 and 2.12; at 64:
# 2.84 and 2.79; at 128: 4.1 and 3.9.
EXPERTS = (
    (24, Tile(tokens=32, rows=128, shared=8, stages=16)),
    (48, Tile(tokens=64, rows=256, shared=8, stages=8)),
    (96, FEW),
    (1 << 62, MANY),
)
LEAST_INT8 = 49  # rows an expert; with fewer, reading the weights takes all the time


def _pairs_layout(rows: int, halves: int):
    """Pairs of columns of the weight, [halves, rows / halves, 32], as a thread's part of wgmma's
    first operand. Of two halves eight rows of one and the same of the other follow each other, so
    that a thread has both."""
    groups = [[0, 8 << i, 0] for i in range(5)]  # of eight rows
    other = [1, 0, 0] if halves == 2 else groups.pop(0)
    return gl.DistributedLinearLayout(
        reg_bases=[other, [0, 0, 4], [0, 0, 8], [0, 0, 16], *groups[3 : 3 + rows // 256]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=groups[:3],
        block_bases=[],
        shape=[halves, rows // halves, 32],
    )


def can_multiply(*widths: int) -> bool:
    """Whether the steps, of which upcasting takes two at a time, divide so many columns."""
    return all(width % BYTES.value == 0 for width in widths)


def can_fill(tokens: int, outputs: int, device: torch.device) -> bool:
    """Whether an int8 product has tiles for half the multiprocessors, and so is faster than one
    that splits K (0.046 against 0.077 ms at 256 tokens of [9216, 6144])."""
    tiles = triton.cdiv(tokens, INT8.tokens) * triton.cdiv(outputs, INT8.rows)
    return 2 * tiles >= _processors(device)


def linear(
    x_TK: Tensor, weight_NK: Tensor, scale_N1: Tensor, y_TN: Tensor, *, silu: bool,
    quantize_x: bool, tile: Tile | None = None,
) -> None:  # fmt: skip
    """y = x (scale * weight)^T, through silu if asked."""
    rows = quantize_rows(x_TK) if quantize_x else (x_TK, scale_N1)
    tile = tile or (INT8 if quantize_x else FEW if len(x_TK) <= FEW.tokens else MANY)
    tiles = triton.cdiv(len(x_TK), tile.tokens)
    _launch(tile, *rows, weight_NK[None], scale_N1, y_TN, tiles, SILU=silu)


def experts(
    x_TD, w13_EFD, w13_scale_EF1, w2_EDF, w2_scale_ED1, y_RD, grouped, weights_TK, *,
    quantize_x: bool, tile: Tile | None = None,
) -> None:  # fmt: skip
    """y[original row] = routing weight * w2(silu(w1 x) * w3 x)."""
    count, doubled, hidden = w13_EFD.shape
    h_RF = torch.empty(len(y_RD), doubled // 2, device=x_TD.device, dtype=x_TD.dtype)
    quantize_x = quantize_x and len(y_RD) >= LEAST_INT8 * count
    chosen = next(tile for most, tile in EXPERTS if len(y_RD) <= most * count)
    tile = tile or (INT8 if quantize_x else chosen)
    places, tiles = grouped.tiles(tile.tokens)
    w13 = w13_EFD.view(2 * count, -1, hidden), w13_scale_EF1
    w2 = w2_EDF, w2_scale_ED1
    of_token = grouped.rows_R, weights_TK.shape[1]
    rows = quantize_rows(x_TD, *of_token) if quantize_x else (gather_rows(x_TD, *of_token), w13[1])
    _launch(tile, *rows, *w13, h_RF, tiles, places, HALVES=2)
    rows = quantize_rows(h_RF) if quantize_x else (h_RF, w2[1])
    _launch(tile, *rows, *w2, y_RD, tiles, places, grouped.rows_R, weights_TK)


def _launch(
    tile: Tile, x_RK: Tensor, x_scale, weight_GNK, scale, y, tiles, places=None, sorted_rows=None,
    weights=None, *, HALVES=1, SILU=False,
):  # fmt: skip
    """One product; x_scale is read if x is int8. `tiles` is their number, or with `places` a tensor
    that holds it; with `sorted_rows`, rows of y go there, times their routing weights."""
    outputs, width = weight_GNK.shape[1:]
    upcast = x_RK.dtype != torch.int8
    x_layout, weight_layout = _LAYOUTS[upcast]
    columns = BYTES.value // x_RK.element_size()
    if upcast:
        weight_GNK = weight_GNK.view(torch.int16)
    product[(_processors(y.device),)](
        TensorDescriptor.from_tensor(x_RK, [tile.tokens, columns], x_layout),
        TensorDescriptor.from_tensor(x_RK, [SHORT.value, columns], x_layout),
        TensorDescriptor.from_tensor(
            weight_GNK, [HALVES, tile.rows // HALVES, columns // (1 + upcast)], weight_layout
        ),
        x_scale, scale, y, y if places is None else places, tiles,
        y if sorted_rows is None else sorted_rows, y if weights is None else weights,
        len(x_RK), outputs, K=width, HALVES=HALVES, GROUPED=places is not None, SILU=SILU,
        ROUTED=sorted_rows is not None, UPCAST=upcast, TOKENS=tile.tokens, ROWS=tile.rows,
        SHARED=tile.shared, STAGES=tile.stages, PAIRS=_pairs_layout(tile.rows, HALVES),
        num_warps=WARPS,
    )  # fmt: skip


_LAYOUTS = {
    False: (gl.NVMMASharedLayout(128, 8, 2), gl.NVMMASharedLayout(128, 8, 3)),
    True: (gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(64, 16, 3)),  # in int16 pairs
}


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
