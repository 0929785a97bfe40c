"""The persistent kernel behind `prompts`: one product, dense or grouped by expert.

A warp copies tiles of x and of the weight to shared memory while eight others multiply, with the
next step always queued behind the one at work, which Triton does not do. Letters as in `prompts`.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BYTES = gl.constexpr(128)  # of a row of x a step
SHORT = gl.constexpr(128)  # rows of x that a short tile, an expert's last, copies and multiplies


def _name(kernel) -> str:
    """What a profile shows."""
    of = kernel.constants
    product = "_gate_up" if of["HALVES"] == 2 else "_down" if of["ROUTED"] else "_linear"
    return product + ("_upcast" if of["UPCAST"] else "_int8")


@gluon.jit(repr=_name, do_not_specialize=["tiles", "R"])
def product(
    x, short_x, weight, x_scale, scale, y, places, tiles, sorted_rows, route_weights, R, N,
    K: gl.constexpr, HALVES: gl.constexpr, GROUPED: gl.constexpr, SILU: gl.constexpr,
    ROUTED: gl.constexpr, UPCAST: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr,
    SHARED: gl.constexpr, STAGES: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = BYTES // 2 if UPCAST else BYTES
    PACKED: gl.constexpr = 2 if UPCAST else 1
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, COLUMNS], x.layout)
    weights = gl.allocate_shared_memory(
        weight.dtype, [STAGES, HALVES, ROWS // HALVES, COLUMNS // PACKED], weight.layout
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
             route_weights, R, N, K, GROUPED, SILU, ROUTED, UPCAST, SHARED, PAIRS)),
            (_copy_tiles, (x, short_x, weight, slots, places, tiles, blocks, R, K, COLUMNS, PACKED,
             GROUPED, SHARED)),
        ],
        [1], [24],
    )  # fmt: skip


@gluon.jit
def _find_tile(
    work, places, tiles, blocks, R, TOKENS: gl.constexpr, GROUPED: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """(block of weight rows, expert, first row, end row): SHARED tiles of each block before the
    next block."""
    group = work // (SHARED * blocks)
    group_tiles = min(tiles - group * SHARED, SHARED)
    within = work % (SHARED * blocks)
    tile = group * SHARED + within % group_tiles
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
    x, short_x, weight, slots, places, tiles, blocks, R, K: gl.constexpr, COLUMNS: gl.constexpr,
    PACKED: gl.constexpr, GROUPED: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    xs, weights, full, empty = slots
    STAGES: gl.constexpr = xs.shape[0]
    TOKENS: gl.constexpr = xs.shape[1]
    HALVES: gl.constexpr = weights.shape[1]
    HALF: gl.constexpr = weights.shape[2]
    step = 0
    for work in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        block, expert, first, end = _find_tile(
            work, places, tiles, blocks, R, TOKENS, GROUPED, SHARED
        )
        for k in range(0, K, COLUMNS):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)
            ready = full.index(slot)
            # What tiles copy from the L2 cache is a limit of theirs beside what they multiply.
            if GROUPED and TOKENS > SHORT and end - first <= SHORT:
                mbarrier.expect(ready, SHORT * BYTES + HALVES * HALF * COLUMNS)
                short = xs.index(slot).slice(0, SHORT)
                tma.async_copy_global_to_shared(short_x, [first, k], ready, short)
            else:
                mbarrier.expect(ready, TOKENS * BYTES + HALVES * HALF * COLUMNS)
                tma.async_copy_global_to_shared(x, [first, k], ready, xs.index(slot))
            tma.async_copy_global_to_shared(
                weight, [expert * HALVES, block * HALF, k // PACKED], ready, weights.index(slot)
            )
            step += 1


@gluon.jit
def _wait_full(slots, step, more=True):
    """The slot of a step, once its tiles are there."""
    full = slots[2]
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(step % STAGES), step // STAGES & 1, pred=more)
    return step % STAGES


@gluon.jit
def _free(slots, step, more=True):
    empty = slots[3]
    STAGES: gl.constexpr = empty.shape[0]
    mbarrier.arrive(empty.index((step + STAGES) % STAGES), pred=more)


@gluon.jit
def _multiply_int8(slots, step, K: gl.constexpr):
    """The next tile's x weight^T, int32 [TOKENS, ROWS], and the step after it."""
    xs, weights = slots[0], slots[1]
    TOKENS: gl.constexpr = xs.shape[1]
    ROWS: gl.constexpr = weights.shape[1] * weights.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32])
    total = gl.zeros((TOKENS, ROWS), gl.int32, mma)
    for k in range(0, K, BYTES):
        slot = _wait_full(slots, step)
        weight = weights.index(slot).reshape((ROWS, BYTES)).permute((1, 0))
        total = warpgroup_mma(xs.index(slot), weight, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        _free(slots, step - 1, k > 0)
        step += 1
    total = warpgroup_mma_wait(0, deps=[total])
    _free(slots, step - 1)
    return total, step


@gluon.jit
def _multiply_upcast(slots, step, K: gl.constexpr, USED: gl.constexpr, PAIRS: gl.constexpr):
    """The same in fp32 [USED, ROWS], of the first USED rows of x. wgmma reads the upcast weights
    from registers until it ends, so they are handed to the wait that says so: their registers must
    not be used again before."""
    weights = slots[1]
    ROWS: gl.constexpr = weights.shape[1] * weights.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, USED, 16])
    total = gl.zeros((ROWS, USED), gl.float32, mma)
    even = _upcast(slots, step, True, mma, PAIRS)
    odd = even
    for k in range(0, K, BYTES):
        total = warpgroup_mma(even, _x(slots, step, USED), total, is_async=True)
        total, odd = warpgroup_mma_wait(1, deps=[total, odd])
        _free(slots, step - 1, k > 0)
        odd = _upcast(slots, step + 1, True, mma, PAIRS)
        total = warpgroup_mma(odd, _x(slots, step + 1, USED), total, is_async=True)
        total, even = warpgroup_mma_wait(1, deps=[total, even])
        _free(slots, step)
        step += 2
        even = _upcast(slots, step, k < K - BYTES, mma, PAIRS)
    total, odd = warpgroup_mma_wait(0, deps=[total, odd])
    _free(slots, step - 1)
    return gl.permute(total, (1, 0)), step


@gluon.jit
def _x(slots, step, USED: gl.constexpr):
    xs = slots[0]
    STAGES: gl.constexpr = xs.shape[0]
    return xs.index(step % STAGES).slice(0, USED).permute((1, 0))


@gluon.jit
def _upcast(slots, step, more, mma: gl.constexpr, PAIRS: gl.constexpr):
    """The weights of a step, once they are there, as wgmma's first operand; int8.py says how."""
    slot = _wait_full(slots, step, more)
    weights = slots[1]
    HALVES: gl.constexpr = weights.shape[1]
    ROWS: gl.constexpr = HALVES * weights.shape[2]
    pairs = weights.index(slot).load(PAIRS).reshape((HALVES, ROWS // HALVES // 8, 8, BYTES // 4))
    pairs = gl.permute(pairs, (1, 0, 2, 3)).reshape((ROWS, BYTES // 4))
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
    whole = gl.join(low, high).reshape(ROWS, BYTES // 2)
    return gl.convert_layout(whole, operand, assert_trivial=True)


@gluon.jit
def _silu(x):
    """x / (1 + exp(-x)) in five instructions: a division alone takes nine, and nothing is computed
    meanwhile."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 t, t;
        mul.f32 $0, $1, t;
        }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _multiply_tiles(
    slots, x_scale, scale, y, places, tiles, blocks, sorted_rows, route_weights, R, N,
    K: gl.constexpr, GROUPED: gl.constexpr, SILU: gl.constexpr, ROUTED: gl.constexpr,
    UPCAST: gl.constexpr, SHARED: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = slots[0].shape[1]
    step = 0
    for work in range(gl.program_id(0), tiles * blocks, gl.num_programs(0)):
        block, expert, first, end = _find_tile(
            work, places, tiles, blocks, R, TOKENS, GROUPED, SHARED
        )
        tensors = (slots, x_scale, scale, y, sorted_rows, route_weights)
        at = (N, block, expert, first, end)
        # An expert's last rows rarely fill a tile.
        if not GROUPED or TOKENS <= SHORT or end - first > SHORT:
            step = _tile(tensors, at, step, K, SILU, ROUTED, UPCAST, TOKENS, PAIRS)
        elif end - first > 64:
            step = _tile(tensors, at, step, K, SILU, ROUTED, UPCAST, SHORT, PAIRS)
        else:
            step = _tile(tensors, at, step, K, SILU, ROUTED, UPCAST, 64, PAIRS)


@gluon.jit
def _tile(
    tensors, at, step, K: gl.constexpr, SILU: gl.constexpr, ROUTED: gl.constexpr,
    UPCAST: gl.constexpr, USED: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    slots, x_scale, scale, y, sorted_rows, route_weights = tensors
    N, block, expert, first, end = at
    HALVES: gl.constexpr = slots[1].shape[1]
    WIDTH: gl.constexpr = slots[1].shape[2]
    ROWS: gl.constexpr = HALVES * WIDTH
    out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [8, 1], [1, 0])
    if UPCAST:
        total, step = _multiply_upcast(slots, step, K, USED, PAIRS)
    else:
        total, step = _multiply_int8(slots, step, K)
    layout: gl.constexpr = total.type.layout
    # Rows past the end read the last one; they are not stored.
    row = gl.minimum(first + gl.arange(0, USED, gl.SliceLayout(1, layout)), end - 1)
    column = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    half, n = column // WIDTH, column % WIDTH
    if UPCAST and HALVES == 2:  # as _upcast orders them
        half, n = column // 8 % 2, column // 16 * 8 + column % 8
    n = gl.minimum(block * WIDTH + n, N - 1) + (expert * HALVES + half) * N
    value = total.to(gl.float32) * gl.load(scale + n).to(gl.float32)[None, :]
    if not UPCAST:
        value *= gl.load(x_scale + row)[:, None]
    if HALVES == 2:
        if UPCAST:
            both = gl.permute(value.reshape((USED, WIDTH // 8, 2, 8)), (0, 1, 3, 2))
            gate, up = gl.split(both.reshape((USED, WIDTH, 2)))
        else:
            gate, up = gl.split(gl.permute(value.reshape((USED, 2, WIDTH)), (0, 2, 1)))
        value = _silu(gate) * up
    if SILU:
        value = _silu(value)
    if ROUTED:
        value *= gl.load(route_weights + gl.load(sorted_rows + row))[:, None]
    row = first + gl.arange(0, USED, gl.SliceLayout(1, out))
    live = row < end
    if ROUTED:
        row = gl.load(sorted_rows + gl.minimum(row, end - 1))
    n = block * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, out))
    gl.store(
        y + row.to(gl.int64)[:, None] * N + n[None, :],
        gl.convert_layout(value.to(gl.bfloat16), out),
        mask=live[:, None] & (n < N)[None, :],
    )
    return step
