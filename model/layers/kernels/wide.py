"""The int8 products of linear.py and experts.py for prompts, in Gluon: 128 weights by 256 tokens.

The same tile (y^T = W x^T), but the next step's weights are upcast while wgmma works on this one's,
which Triton does not let one write: 500 TFLOP/s there, 590 here. T tokens, N rows of the weight,
K columns.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(128)  # of the weight in a tile
COLUMNS = gl.constexpr(64)  # of the weight a step
WARPS = gl.constexpr(8)
GROUPED_TILES = 4  # token tiles that share a weight tile while it is in the L2 cache
# How tiles are copied to shared memory, and weights read from it to be wgmma's first operand.
WEIGHT_COPY = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0]))
X_COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 32],
    )
)


def can_multiply(width: int) -> bool:
    """Whether a weight of `width` columns fits the steps."""
    return width % COLUMNS.value == 0


def linear(x_TK: Tensor, weight_NK: Tensor, scale_N1: Tensor, y_TN: Tensor, silu: bool) -> None:
    """y = x (scale * weight)^T; weight_NK as int16 pairs [N, K / 2]."""
    (tokens, width), outputs = x_TK.shape, weight_NK.shape[0]
    # Between these the smaller tile fills the card better (0.147 against 0.164 ms at 512).
    tile = 128 if 256 < tokens <= 1536 else 256
    _linear[(triton.cdiv(outputs, ROWS.value) * triton.cdiv(tokens, tile),)](
        x_TK, weight_NK, scale_N1, y_TN, tokens, outputs,
        K=width, TOKENS=tile, STAGES=4, GROUPED=GROUPED_TILES, SILU=silu, num_warps=WARPS.value,
    )  # fmt: skip


def gate_up(x_TD, w13_EFD, scale_EF1, h_RF, grouped, choices: int) -> None:
    """h[sorted row] = silu(w1 x) * w3 x; w13 as int16 pairs."""
    width, hidden = h_RF.shape[1], x_TD.shape[1]
    _gate_up[(grouped.most_tiles(256) * triton.cdiv(width, ROWS.value // 2),)](
        x_TD, w13_EFD, scale_EF1, h_RF, grouped.rows_R, grouped.ends_E, width, grouped.experts,
        K=hidden, CHOICES=choices, EXPERTS=triton.next_power_of_2(grouped.experts),
        num_warps=WARPS.value,
    )  # fmt: skip


def down(h_RF, w2_EDF, scale_ED1, y_RD, grouped, weights_TK: Tensor) -> None:
    """y[original row] = routing weight * w2 h[sorted row]; w2 as int16 pairs."""
    hidden, width = y_RD.shape[1], h_RF.shape[1]
    _down[(grouped.most_tiles(256) * triton.cdiv(hidden, ROWS.value),)](
        h_RF, w2_EDF, scale_ED1, y_RD, grouped.rows_R, grouped.ends_E, hidden, grouped.experts,
        weights_TK, K=width, EXPERTS=triton.next_power_of_2(grouped.experts),
        num_warps=WARPS.value,
    )  # fmt: skip


@gluon.jit
def _upcast(pairs, mma: gl.constexpr):
    """int16 pairs of int8 -> bf16 as wgmma's first operand; int8.py says how."""
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 t, u, v;
        cvt.u32.u16 t, $2;
        prmt.b32 t, t, 0x43434343, 0x4140;
        and.b32 u, t, 0xff7fff7f;
        and.b32 v, t, 0xff80ff80;
        sub.bf16x2 t, u, v;
        mov.b32 {$0, $1}, t;
        }""",
        "=h,=h,h",
        [pairs],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    whole = gl.join(low, high).reshape(ROWS, COLUMNS)
    return gl.convert_layout(whole, operand, assert_trivial=True)


@gluon.jit
def _copy_step(weights, xs, weight, x, weight_at, x_at, k, K, STAGES: gl.constexpr):
    slot = (k // COLUMNS) % STAGES
    more = k < K
    async_copy.async_copy_global_to_shared(
        weights.index(slot), weight + k // 2 + weight_at, mask=(weight_at >= 0) & more
    )
    async_copy.async_copy_global_to_shared(xs.index(slot), x + k + x_at, mask=(x_at >= 0) & more)
    async_copy.commit_group()


@gluon.jit
def _multiply(
    weight, x, n, t, K: gl.constexpr, mma: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr
):
    """W[n] x[t]^T -> fp32 [ROWS, TOKENS], not yet scaled."""
    weights = gl.allocate_shared_memory(
        gl.int16, [STAGES, ROWS, COLUMNS // 2], gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    )
    xs = gl.allocate_shared_memory(
        gl.bfloat16, [STAGES, TOKENS, COLUMNS], gl.NVMMASharedLayout(128, 16, 2)
    )
    pair = gl.arange(0, COLUMNS // 2, gl.SliceLayout(0, WEIGHT_COPY))
    weight_at = n[:, None] * (K // 2) + pair[None, :]
    x_at = t[:, None] * K + gl.arange(0, COLUMNS, gl.SliceLayout(0, X_COPY))[None, :]
    for stage in gl.static_range(STAGES - 1):
        _copy_step(weights, xs, weight, x, weight_at, x_at, stage * COLUMNS, K, STAGES)
    total = gl.zeros((ROWS, TOKENS), gl.float32, mma)
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    gl.thread_barrier()
    operand = _upcast(weights.index(0).load(PAIRS), mma)
    for k in range(0, K, COLUMNS):
        step = k // COLUMNS
        x_tile = xs.index(step % STAGES).permute((1, 0))
        running = warpgroup_mma(operand, x_tile, total, is_async=True)
        # The barrier also says that all warps are done with the step before, whose slot is next.
        async_copy.wait_group(STAGES - 3)
        fence_async_shared()
        gl.thread_barrier()
        pairs = weights.index((step + 1) % STAGES).load(PAIRS)
        ahead = k + (STAGES - 1) * COLUMNS
        _copy_step(weights, xs, weight, x, weight_at, x_at, ahead, K, STAGES)
        following = _upcast(pairs, mma)
        # All of them: wgmma reads `operand` until it ends, and its registers are used again.
        total, operand, _ = warpgroup_mma_wait(0, deps=[running, following, operand])
    return total


@gluon.jit
def _linear(
    x, weight, scale, y, T, N, K: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    GROUPED: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TOKENS, 16])
    program = gl.program_id(0)
    row_tiles = gl.cdiv(N, ROWS)
    token_tiles = gl.cdiv(T, TOKENS)
    group = program // (GROUPED * row_tiles)
    group_tiles = min(token_tiles - group * GROUPED, GROUPED)
    within = program % (GROUPED * row_tiles)
    first_n = (within // group_tiles) * ROWS
    first_t = (group * GROUPED + within % group_tiles) * TOKENS

    # Rows past the end read the last one; they are not stored.
    n = gl.minimum(first_n + gl.arange(0, ROWS, gl.SliceLayout(1, WEIGHT_COPY)), N - 1)
    t = gl.minimum(first_t + gl.arange(0, TOKENS, gl.SliceLayout(1, X_COPY)), T - 1)
    total = _multiply(weight, x, n, t, K, mma, TOKENS, STAGES)
    n = gl.minimum(first_n + gl.arange(0, ROWS, gl.SliceLayout(1, mma)), N - 1)
    total = total * gl.load(scale + n).to(gl.float32)[:, None]
    if SILU:
        total = total / (1 + gl.exp(-total))
    out: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    t = first_t + gl.arange(0, TOKENS, gl.SliceLayout(1, out))
    _store(y, total, t, t < T, first_n, N, out, ROWS)


@gluon.jit
def _store(y, value, row, live, first, N, out: gl.constexpr, WIDTH: gl.constexpr):
    """y[row, first : first + WIDTH] = value^T in bf16."""
    n = first + gl.arange(0, WIDTH, gl.SliceLayout(0, out))
    value = gl.convert_layout(gl.permute(value.to(gl.bfloat16), (1, 0)), out)
    places = row.to(gl.int64)[:, None] * N + n[None, :]
    gl.store(y + places, value, mask=live[:, None] & (n < N)[None, :])


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _find_tile(program, ends, blocks, count, TOKENS: gl.constexpr, EXPERTS: gl.constexpr):
    """As experts.py's: (expert, block of weight rows, first row, end row)."""
    each = gl.arange(0, EXPERTS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    end = gl.load(ends + each, mask=each < count, other=0)
    start = gl.load(ends + each - 1, mask=(each > 0) & (each < count), other=0)
    tiles = gl.where(each < count, (end - start + TOKENS - 1) // TOKENS, 0)
    tile_end = gl.associative_scan(tiles, 0, _add)
    expert = gl.sum(((tile_end * blocks <= program) & (each < count)).to(gl.int32), 0)
    mine = each == expert
    expert_tiles = gl.maximum(gl.sum(gl.where(mine, tiles, 0), 0), 1)
    within = program - (gl.sum(gl.where(mine, tile_end, 0), 0) - expert_tiles) * blocks
    first = gl.sum(gl.where(mine, start, 0), 0) + (within % expert_tiles) * TOKENS
    return expert, within // expert_tiles, first, gl.sum(gl.where(mine, end, 0), 0)


@gluon.jit
def _gate_up(
    x, weight, scale, h, sorted_rows, ends, N, count,
    K: gl.constexpr, CHOICES: gl.constexpr, EXPERTS: gl.constexpr,
):  # fmt: skip
    expert, block, first, end = _find_tile(
        gl.program_id(0), ends, gl.cdiv(N, ROWS // 2), count, 256, EXPERTS
    )
    if expert >= count:
        return
    weight += expert.to(gl.int64) * (N * K)
    scale += expert * 2 * N
    # The last rows of an expert rarely fill a tile: half a tile costs two thirds of a whole one.
    if end - first > 128:
        _gate_up_tile(x, weight, scale, h, sorted_rows, block, first, end, N, K, CHOICES, 256)
    else:
        _gate_up_tile(x, weight, scale, h, sorted_rows, block, first, end, N, K, CHOICES, 128)


@gluon.jit
def _both(block, row, N):
    """Rows of w1 and w3 in a tile: eight, then the same eight, so that a thread holds both."""
    n = gl.minimum(block * (ROWS // 2) + row // 16 * 8 + row % 8, N - 1)
    return n + (row // 8 % 2) * N


@gluon.jit
def _gate_up_tile(
    x, weight, scale, h, sorted_rows, block, first, end, N,
    K: gl.constexpr, CHOICES: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TOKENS, 16])
    half: gl.constexpr = ROWS // 2
    n = _both(block, gl.arange(0, ROWS, gl.SliceLayout(1, WEIGHT_COPY)), N)
    row = gl.minimum(first + gl.arange(0, TOKENS, gl.SliceLayout(1, X_COPY)), end - 1)
    token = gl.load(sorted_rows + row) // CHOICES
    total = _multiply(weight, x, n, token, K, mma, TOKENS, 5)
    n = _both(block, gl.arange(0, ROWS, gl.SliceLayout(1, mma)), N)
    total = total * gl.load(scale + n).to(gl.float32)[:, None]
    pairs = gl.permute(total.reshape(ROWS // 16, 2, 8, TOKENS), (0, 2, 3, 1))
    gate, up = gl.split(pairs.reshape(half, TOKENS, 2))
    out: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    row = first + gl.arange(0, TOKENS, gl.SliceLayout(1, out))
    _store(h, gate / (1 + gl.exp(-gate)) * up, row, row < end, block * half, N, out, half)


@gluon.jit
def _down(
    h, weight, scale, y, sorted_rows, ends, N, count, route_weights,
    K: gl.constexpr, EXPERTS: gl.constexpr,
):  # fmt: skip
    expert, block, first, end = _find_tile(
        gl.program_id(0), ends, gl.cdiv(N, ROWS), count, 256, EXPERTS
    )
    if expert >= count:
        return
    weight += expert.to(gl.int64) * (N * (K // 2))
    scale += expert * N
    if end - first > 128:
        _down_tile(h, weight, scale, y, sorted_rows, block, first, end, N, route_weights, K, 256)
    else:
        _down_tile(h, weight, scale, y, sorted_rows, block, first, end, N, route_weights, K, 128)


@gluon.jit
def _down_tile(
    h, weight, scale, y, sorted_rows, block, first, end, N, route_weights,
    K: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TOKENS, 16])
    n = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WEIGHT_COPY))
    row = first + gl.arange(0, TOKENS, gl.SliceLayout(1, X_COPY))
    n, row = gl.minimum(n, N - 1), gl.minimum(row, end - 1)
    total = _multiply(weight, h, n, row, K, mma, TOKENS, 5)
    n = gl.minimum(block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, mma)), N - 1)
    row = gl.minimum(first + gl.arange(0, TOKENS, gl.SliceLayout(0, mma)), end - 1)
    total = total * gl.load(scale + n).to(gl.float32)[:, None]
    total = total * gl.load(route_weights + gl.load(sorted_rows + row))[None, :]
    out: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    row = first + gl.arange(0, TOKENS, gl.SliceLayout(1, out))
    original = gl.load(sorted_rows + gl.minimum(row, end - 1))
    _store(y, total, original, row < end, block * ROWS, N, out, ROWS)
