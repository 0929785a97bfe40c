"""y = x W^T with int8 weights upcast inside the product; no bf16 copy of the weight is written.

T tokens, N rows of the weight (outputs), K columns (inputs), P parts that K is split into.
The tile computed is y^T = W x^T: the weight is then wgmma's first operand, which may come from
registers, so the upcast values never go back to shared memory.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.layers.kernels.int8 import load_weight, settle

try:
    from model.layers.kernels import prompts
except ImportError:  # Gluon is an experiment of Triton's and moves: 500 TFLOP/s without it, not 750
    prompts = None


@dataclass(frozen=True)
class LinearConfig:
    rows: int  # of the weight in a tile
    tokens: int
    columns: int  # of the weight a step
    warps: int
    stages: int
    splits: int = 1  # parts of K, each its own program, summed by a second kernel


# Measured on an H100 at the shapes of the projections (tests/gpu/bench_kernels.py); up to so many
# tokens.
CONFIGS = (
    (16, LinearConfig(rows=64, tokens=16, columns=256, warps=4, stages=3, splits=4)),
    (32, LinearConfig(rows=64, tokens=32, columns=128, warps=4, stages=5, splits=2)),
    (64, LinearConfig(rows=64, tokens=64, columns=128, warps=4, stages=3, splits=4)),
    (128, LinearConfig(rows=64, tokens=128, columns=128, warps=4, stages=3, splits=2)),
    (512, LinearConfig(rows=128, tokens=128, columns=64, warps=4, stages=4, splits=3)),
    (1 << 62, LinearConfig(rows=128, tokens=128, columns=64, warps=4, stages=4)),
)
ENOUGH_TILES = 288  # more than two a multiprocessor of an H100: K need not be split to fill it
MOST_NARROW = 128  # tokens; more of them go to prompts.py
MOST_NARROW_WIDE = 64  # of products with so many outputs that prompts.py has tiles for all
GROUPED_TILES = 4  # token tiles that share a weight tile while it is in the L2 cache


def int8_linear(
    x_TK: Tensor, weight_NK: Tensor, scale_N1: Tensor, *, silu: bool = False,
    quantize_x: bool = False, config: LinearConfig | None = None,
) -> Tensor:  # fmt: skip
    """x_TK bf16, weight_NK int8, scale_N1 bf16 -> y_TN bf16; `silu` applies it to y.

    quantize_x lets x be rounded to int8 where that is faster.
    K must be a multiple of 32. Raises ValueError where T * K needs more than 32 bits.
    """
    tokens, width = x_TK.shape
    outputs = weight_NK.shape[0]
    y_TN = torch.empty(tokens, outputs, device=x_TK.device, dtype=x_TK.dtype)
    if tokens == 0:
        return y_TN
    if x_TK.numel() >= 1 << 31:
        raise ValueError(f"{tokens} tokens of {width}; the kernels index x with 32 bits")
    x_TK = x_TK.contiguous()
    if config is None and prompts and prompts.can_multiply(width):
        fills = prompts.can_fill(tokens, outputs, x_TK.device)
        quantize_x = quantize_x and fills
        if quantize_x or tokens > (MOST_NARROW_WIDE if fills else MOST_NARROW):
            prompts.linear(x_TK, weight_NK, scale_N1, y_TN, silu=silu, quantize_x=quantize_x)
            return y_TN
    config = config or next(c for most, c in CONFIGS if tokens <= most)
    columns = min(config.columns, width & -width)
    tiles = triton.cdiv(outputs, config.rows) * triton.cdiv(tokens, config.tokens)
    splits = config.splits if tiles < ENOUGH_TILES else 1
    while width % (splits * columns):
        splits -= 1
    out = y_TN
    if splits > 1:
        out = torch.empty(splits, tokens, outputs, device=x_TK.device, dtype=torch.float32)
    _product[(tiles, splits)](
        x_TK, weight_NK.view(torch.int16), scale_N1, out, tokens, outputs,
        K=width, PART=width // splits, ROWS=config.rows, TOKENS=config.tokens, COLUMNS=columns,
        GROUPED=GROUPED_TILES, PARTIAL=splits > 1, SILU=silu,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        _sum_parts[(tokens, triton.cdiv(outputs, 1024))](
            out, scale_N1, y_TN, tokens * outputs, outputs, SPLITS=splits, BLOCK=1024, SILU=silu
        )
    return y_TN


@triton.jit(do_not_specialize=["T"])
def _product(
    x, weight, scale, y, T, N, K: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, GROUPED: tl.constexpr,
    PARTIAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    # K is a constant: ptxas waits for every single wgmma where the trip count of a loop is unknown.
    program = tl.program_id(0)
    split = tl.program_id(1)
    row_tiles = tl.cdiv(N, ROWS)
    token_tiles = tl.cdiv(T, TOKENS)
    group = program // (GROUPED * row_tiles)
    group_tiles = min(token_tiles - group * GROUPED, GROUPED)
    within = program % (GROUPED * row_tiles)
    n = (within // group_tiles) * ROWS + tl.arange(0, ROWS)
    t = (group * GROUPED + within % group_tiles) * TOKENS + tl.arange(0, TOKENS)

    # Rows past the end read the last one; they are not stored.
    n_read = tl.minimum(n, N - 1)
    weight_places = n_read[:, None] * (K // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    x_places = tl.minimum(t, T - 1)[None, :] * K + tl.arange(0, COLUMNS)[:, None]
    weight += split * (PART // 2)
    x += split * PART
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for _ in range(0, PART, COLUMNS):
        total = tl.dot(
            load_weight(weight + weight_places, True, ROWS, COLUMNS), tl.load(x + x_places), total
        )
        total = settle(total)
        weight += COLUMNS // 2
        x += COLUMNS

    stored = (t < T)[:, None] & (n < N)[None, :]
    places = t.to(tl.int64)[:, None] * N + n[None, :]
    if PARTIAL:
        tl.store(y + split.to(tl.int64) * T * N + places, tl.trans(total), mask=stored)
    else:
        total = total * tl.load(scale + n_read).to(tl.float32)[:, None]
        if SILU:
            total = total * tl.sigmoid(total)
        tl.store(y + places, tl.trans(total.to(y.dtype.element_ty)), mask=stored)


@triton.jit
def _sum_parts(
    parts, scale, y, part_size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr
):
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = tl.program_id(0).to(tl.int64) * N + n
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * part_size.to(tl.int64) + places, mask=n < N, other=0.0)
    total = total * tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(y + places, total.to(y.dtype.element_ty), mask=n < N)
