"""Products of int8 activations with int8 weights, dense and grouped by expert, in Gluon.

One persistent kernel: a warp copies tiles of x and of the weight to shared memory while eight
others multiply, so the tensor cores wait for nothing but the end of a tile. Triton's own pipeline
waits for every step of an int8 product. T tokens, R rows (a token's choices), N rows of the weight,
K columns, E experts, D hidden, F expert width.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from model.layers.kernels.quantize import quantize_rows

TOKENS = gl.constexpr(128)  # rows of x in a tile
ROWS = gl.constexpr(256)  # of the weight in a tile
COLUMNS = gl.constexpr(128)  # of both a step
STAGES = gl.constexpr(4)  # steps in shared memory: 192 of its 227 KiB
WARPS = 8
# Token tiles that share a tile of the weight while it is in the L2 cache.
SHARED_TILES = gl.constexpr(16)
X_LAYOUT = gl.NVMMASharedLayout(128, 8, 2)
WEIGHT_LAYOUT = gl.NVMMASharedLayout(128, 8, 3)


def linear(x_TK: Tensor, weight_NK: Tensor, scale_N1: Tensor, y_TN: Tensor, silu: bool) -> None:
    """y = scale_x * scale * (x as int8) weight^T, through silu if asked."""
    rows = quantize_rows(x_TK)
    tiles = triton.cdiv(len(x_TK), TOKENS.value)
    _launch(rows, weight_NK[None], scale_N1, y_TN, tiles, SILU=silu)


def experts(x_TD, w13_EFD, w13_scale_EF1, w2_EDF, w2_scale_ED1, y_RD, grouped, weights_TK) -> None:
    """y[original row] = routing weight * w2(silu(w1 x) * w3 x), both inputs as int8."""
    count, doubled, hidden = w13_EFD.shape
    h_RF = torch.empty(len(y_RD), doubled // 2, device=x_TD.device, dtype=x_TD.dtype)
    places, tiles = grouped.tiles(TOKENS.value)
    rows = quantize_rows(x_TD, grouped.rows_R, weights_TK.shape[1])
    _launch(rows, w13_EFD.view(2 * count, -1, hidden), w13_scale_EF1, h_RF, tiles, places, HALVES=2)
    rows = quantize_rows(h_RF)
    _launch(rows, w2_EDF, w2_scale_ED1, y_RD, tiles, places, grouped.rows_R, weights_TK)


def _launch(
    rows, weight_GNK, scale, y, tiles, places=None, sorted_rows=None, weights=None, *,
    HALVES=1, SILU=False,
):  # fmt: skip
    """One product. `tiles` is their number, or with `places` a tensor that holds it; with
    `sorted_rows`, rows of y go there, times their routing weights."""
    data_RK, scale_R = rows
    outputs, width = weight_GNK.shape[1:]
    sizes = [TOKENS.value, COLUMNS.value], [HALVES, ROWS.value // HALVES, COLUMNS.value]
    _product[(_processors(y.device),)](
        TensorDescriptor.from_tensor(data_RK, sizes[0], X_LAYOUT),
        TensorDescriptor.from_tensor(weight_GNK, sizes[1], WEIGHT_LAYOUT),
        scale_R, scale, y, y if places is None else places, tiles,
        y if sorted_rows is None else sorted_rows, y if weights is None else weights,
        len(data_RK), outputs, K=width, HALVES=HALVES, GROUPED=places is not None, SILU=SILU,
        ROUTED=sorted_rows is not None,
        num_warps=WARPS,
    )  # fmt: skip


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _name(kernel) -> str:
    """What a profile shows."""
    of = kernel.constants
    if of["HALVES"] == 2:
        return "_gate_up_dynamic"
    return "_down_dynamic" if of["ROUTED"] else "_linear_dynamic"


@gluon.jit(repr=_name)
def _product(
    x, weight, x_scale, scale, y, places, tiles, sorted_rows, route_weights, R, N,
    K: gl.constexpr, HALVES: gl.constexpr, GROUPED: gl.constexpr, SILU: gl.constexpr,
    ROUTED: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, TOKENS, COLUMNS], x.layout)
    weights = gl.allocate_shared_memory(
        gl.int8, [STAGES, HALVES, ROWS // HALVES, COLUMNS], weight.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(empty.index(stage), 1)
    fence_async_shared()
    if GROUPED:
        tiles = gl.load(tiles)
    blocks = gl.cdiv(N, ROWS // HALVES)
    slots = (xs, weights, full, empty)
    gl.warp_specialize(
        [
            (_multiply_tiles, (slots, x_scale, scale, y, places, tiles, blocks, sorted_rows,
             route_weights, R, N, K, HALVES, GROUPED, SILU, ROUTED)),
            (_copy_tiles, (x, weight, slots, places, tiles, blocks, R, K, HALVES, GROUPED)),
        ],
        [1], [40],
    )  # fmt: skip


@gluon.jit
def _find_tile(work, places, tiles, blocks, R, GROUPED: gl.constexpr):
    """(block of weight rows, expert, first row, end row): SHARED_TILES tiles of each block before
    the next block."""
    group = work // (SHARED_TILES * blocks)
    group_tiles = min(tiles - group * SHARED_TILES, SHARED_TILES)
    within = work % (SHARED_TILES * blocks)
    tile = group * SHARED_TILES + within % group_tiles
    expert = 0
    first = tile * TOKENS
    end = R
    if GROUPED:
        expert = gl.load(places + 3 * tile)
        first = gl.load(places + 3 * tile + 1)
        end = gl.load(places + 3 * tile + 2)
    return within // group_tiles, expert, first, end


@gluon.jit
def _copy_tiles(
    x, weight, slots, places, tiles, blocks, R,
    K: gl.constexpr, HALVES: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    xs, weights, full, empty = slots
    step = 0
    for work in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        block, expert, first, _ = _find_tile(work, places, tiles, blocks, R, GROUPED)
        for k in range(0, K, COLUMNS):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, (TOKENS + ROWS) * COLUMNS)
            tma.async_copy_global_to_shared(x, [first, k], ready, xs.index(slot))
            tma.async_copy_global_to_shared(
                weight, [expert * HALVES, block * (ROWS // HALVES), k], ready, weights.index(slot)
            )
            step += 1


@gluon.jit
def _multiply(slots, step, mma: gl.constexpr, K: gl.constexpr):
    """The next tile's x weight^T, int32 [TOKENS, ROWS], and the step after it."""
    xs, weights, full, empty = slots
    total = gl.zeros((TOKENS, ROWS), gl.int32, mma)
    for k in range(0, K, COLUMNS):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        weight = weights.index(slot).reshape((ROWS, COLUMNS)).permute((1, 0))
        total = warpgroup_mma(xs.index(slot), weight, total, is_async=True)
        # One step is always queued behind the one at work; the slot before it is free again.
        total = warpgroup_mma_wait(1, deps=[total])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return total, step


@gluon.jit
def _multiply_tiles(
    slots, x_scale, scale, y, places, tiles, blocks, sorted_rows, route_weights, R, N,
    K: gl.constexpr, HALVES: gl.constexpr, GROUPED: gl.constexpr, SILU: gl.constexpr,
    ROUTED: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32])
    WIDTH: gl.constexpr = ROWS // HALVES
    out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [8, 1], [1, 0])
    step = 0
    for work in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        block, expert, first, end = _find_tile(work, places, tiles, blocks, R, GROUPED)
        total, step = _multiply(slots, step, mma, K)
        # Rows past the end read the last one; they are not stored.
        row = gl.minimum(first + gl.arange(0, TOKENS, gl.SliceLayout(1, mma)), end - 1)
        column = gl.arange(0, ROWS, gl.SliceLayout(0, mma))
        n = gl.minimum(block * WIDTH + column % WIDTH, N - 1)
        n += (expert * HALVES + column // WIDTH) * N
        value = total.to(gl.float32) * gl.load(x_scale + row)[:, None]
        value *= gl.load(scale + n).to(gl.float32)[None, :]
        if HALVES == 2:
            gate, up = gl.split(gl.permute(value.reshape((TOKENS, 2, WIDTH)), (0, 2, 1)))
            value = gate / (1 + gl.exp(-gate)) * up
        if SILU:
            value = value / (1 + gl.exp(-value))
        if ROUTED:
            value *= gl.load(route_weights + gl.load(sorted_rows + row))[:, None]
        row = first + gl.arange(0, TOKENS, gl.SliceLayout(1, out))
        live = row < end
        if ROUTED:
            row = gl.load(sorted_rows + gl.minimum(row, end - 1))
        n = block * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, out))
        gl.store(
            y + row.to(gl.int64)[:, None] * N + n[None, :],
            gl.convert_layout(value.to(gl.bfloat16), out),
            mask=live[:, None] & (n < N)[None, :],
        )
