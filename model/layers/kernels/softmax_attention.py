"""Grouped-query attention over paged K/V for a batch of prompt chunks and single tokens.

T new tokens, S sequences, H query heads, G key heads, D head width, B blocks of a table, P tokens
of a block. New keys and values are written into the pool first; both attention kernels then read
only the pool.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERY_TILE = 64  # tokens of a prompt chunk a program
WRITE_TILE = 64
WANTED_PROGRAMS = 528  # four a multiprocessor of an H100, to split long contexts of few sequences
LEAST_BLOCKS = 4  # of a split
USUAL_SEQUENCES = 512  # of a batch, at most: one kernel for all these


def paged_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, keys_BPGD: Tensor, values_BPGD: Tensor, batch
) -> Tensor:
    """Write k and v into the pool, attend causally with scale 1 / sqrt(D) -> o_THD bf16.

    The last dimension of q, k, v must be contiguous, and the pools whole. The number of programs
    depends only on batch.lengths and the shape of the block table, so a captured launch stays right
    as contexts grow.
    """
    tokens, heads, width = q_THD.shape
    groups = k_TGD.shape[1]
    o_THD = torch.empty(tokens, heads, width, device=q_THD.device, dtype=q_THD.dtype)
    if tokens == 0:
        return o_THD
    pools = (keys_BPGD, values_BPGD)
    where = (batch.offsets_S1, batch.contexts_S, batch.blocks_SB)
    sequences, table = batch.blocks_SB.shape
    padded = max(USUAL_SEQUENCES, triton.next_power_of_2(sequences))
    sizes = {"WIDTH": width, "BLOCK": keys_BPGD.shape[1]}

    tiles = sum(triton.cdiv(length, WRITE_TILE) for length in batch.lengths)
    _write_keys_values[(tiles, groups)](
        k_TGD, v_TGD, *pools, *where, sequences, table, groups, *k_TGD.stride()[:2],
        *v_TGD.stride()[:2], SEQUENCES=padded, TILE=WRITE_TILE, **sizes,
    )  # fmt: skip
    scale = width**-0.5 * 1.4426950408889634  # the kernels use powers of two
    tiles = sum(triton.cdiv(length, QUERY_TILE) for length in batch.lengths if length > 1)
    if tiles:
        _softmax_chunks[(heads, tiles)](
            q_THD, *pools, o_THD, *where, sequences, table, groups, *q_THD.stride()[:2], scale,
            HEADS=heads, SEQUENCES=padded, TILE=QUERY_TILE, **sizes, num_warps=4, num_stages=2,
        )  # fmt: skip
    if any(length == 1 for length in batch.lengths):
        _attend_single(q_THD, pools, o_THD, where, groups, scale, sizes)
    return o_THD


def _attend_single(q_THD, pools, o_THD, where, groups, scale, sizes):
    """Sequences of one new token; a long context is split over programs and its parts joined."""
    heads, width = q_THD.shape[1:]
    sequences, table = where[2].shape
    splits = max(1, min(WANTED_PROGRAMS // (sequences * groups), table // LEAST_BLOCKS, 64))
    split_blocks = triton.cdiv(table, splits)
    device = q_THD.device
    parts = torch.empty(sequences, heads, splits, width, device=device, dtype=torch.float32)
    weights = torch.empty(sequences, heads, splits, 2, device=device, dtype=torch.float32)
    _softmax_single_tokens[(splits, groups, sequences)](
        q_THD, *pools, o_THD, parts, weights, *where, table, split_blocks, groups,
        *q_THD.stride()[:2], scale, SHARED=heads // groups,
        SHARED_TILE=max(16, triton.next_power_of_2(heads // groups)),
        WHOLE=splits == 1, **sizes, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _join_parts[(heads, sequences)](
            parts, weights, o_THD, where[0], splits, heads, WIDTH=width,
            SPLITS=max(8, triton.next_power_of_2(splits)), num_warps=1,
        )  # fmt: skip


@triton.jit
def _find_tile(
    program, offsets, count, SEQUENCES: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr
):
    """(sequence, tile within it) of a program, where sequences shorter than LEAST have no tiles."""
    each = tl.arange(0, SEQUENCES)
    start = tl.load(offsets + each, mask=each < count, other=0)
    length = tl.load(offsets + each + 1, mask=each < count, other=0) - start
    tiles = tl.where((each < count) & (length >= LEAST), (length + TILE - 1) // TILE, 0)
    end = tl.cumsum(tiles, 0)
    sequence = tl.sum(((end <= program) & (each < count)).to(tl.int32), 0)
    before = tl.sum(tl.where(each < sequence, tiles, 0), 0)
    return sequence, program - before


@triton.jit(do_not_specialize=["count", "table"])
def _write_keys_values(
    k, v, keys, values, offsets, contexts, blocks, count, table, groups,
    k_token, k_group, v_token, v_group,
    SEQUENCES: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, tile = _find_tile(tl.program_id(0), offsets, count, SEQUENCES, TILE, 1)
    group = tl.program_id(1)
    start = tl.load(offsets + sequence)
    within = tile * TILE + tl.arange(0, TILE)
    live = within < tl.load(offsets + sequence + 1) - start
    position = tl.load(contexts + sequence) + within
    block = tl.load(blocks + sequence * table + position // BLOCK, mask=live, other=0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    place = ((block * BLOCK + position % BLOCK) * groups + group)[:, None] * WIDTH + d[None, :]
    token = (start + within).to(tl.int64)[:, None]
    k_TD = tl.load(k + token * k_token + group * k_group + d[None, :], mask=live[:, None])
    tl.store(keys + place, k_TD, mask=live[:, None])
    v_TD = tl.load(v + token * v_token + group * v_group + d[None, :], mask=live[:, None])
    tl.store(values + place, v_TD, mask=live[:, None])


@triton.jit
def _attend(
    q_TD, total, most, norm, keys, values, table_row, first, last, end, position, groups, group,
    scale, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax over blocks first..last - 1. `position`: of each query; keys stop at `end`."""
    d = tl.arange(0, WIDTH)
    p = tl.arange(0, BLOCK)
    inside = (p[:, None] * groups + group) * WIDTH + d[None, :]
    for index in range(first, last):
        place = tl.load(table_row + index).to(tl.int64) * (BLOCK * groups * WIDTH) + inside
        scores = tl.dot(q_TD, tl.trans(tl.load(keys + place))) * scale
        if MASKED:
            scores = tl.where(
                position[:, None] >= (index * BLOCK + p)[None, :], scores, float("-inf")
            )
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        norm = norm * shrink + tl.sum(weights, 1)
        if MASKED:  # what another sequence left after the end may be inf, and 0 * inf is not 0
            value = tl.load(values + place, mask=(index * BLOCK + p < end)[:, None], other=0.0)
        else:
            value = tl.load(values + place)
        total = tl.dot(weights.to(q_TD.dtype), value, total * shrink[:, None])
        most = new_most
    return total, most, norm


@triton.jit(do_not_specialize=["count", "table"])
def _softmax_chunks(
    q, keys, values, o, offsets, contexts, blocks, count, table, groups, q_token, q_head, scale,
    HEADS: tl.constexpr, SEQUENCES: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # Backwards: the last tiles of a prompt attend to the most, and long programs start first.
    sequence, tile = _find_tile(
        tl.num_programs(1) - 1 - tl.program_id(1), offsets, count, SEQUENCES, TILE, 2
    )
    group = head // (HEADS // groups)
    start = tl.load(offsets + sequence)
    length = tl.load(offsets + sequence + 1) - start
    context = tl.load(contexts + sequence)
    within = tile * TILE + tl.arange(0, TILE)
    live = (within < length)[:, None]
    d = tl.arange(0, WIDTH)
    token = (start + within).to(tl.int64)[:, None]
    q_TD = tl.load(q + token * q_token + head * q_head + d[None, :], mask=live, other=0.0)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    most = tl.full((TILE,), -1e30, tl.float32)
    norm = tl.zeros((TILE,), tl.float32)
    whole = (context + tile * TILE + 1) // BLOCK  # blocks that every query of the tile sees whole
    end = context + tl.minimum((tile + 1) * TILE, length)
    last = (end + BLOCK - 1) // BLOCK
    table_row = blocks + sequence * table
    position = context + within
    total, most, norm = _attend(
        q_TD, total, most, norm, keys, values, table_row, 0, whole, end, position, groups, group,
        scale, False, WIDTH, BLOCK,
    )  # fmt: skip
    total, most, norm = _attend(
        q_TD, total, most, norm, keys, values, table_row, whole, last, end, position, groups,
        group, scale, True, WIDTH, BLOCK,
    )  # fmt: skip
    out = total / norm[:, None]
    tl.store(o + (token * HEADS + head) * WIDTH + d[None, :], out.to(o.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["table", "split_blocks"])
def _softmax_single_tokens(
    q, keys, values, o, parts, weights, offsets, contexts, blocks, table, split_blocks, groups,
    q_token, q_head, scale, SHARED: tl.constexpr, SHARED_TILE: tl.constexpr, WHOLE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The query heads that share one key head, for one sequence and one part of its context."""
    split = tl.program_id(0)
    group = tl.program_id(1)
    sequence = tl.program_id(2)
    token = tl.load(offsets + sequence).to(tl.int64)
    if tl.load(offsets + sequence + 1) - token != 1:
        return
    context = tl.load(contexts + sequence)
    shared = tl.arange(0, SHARED_TILE)
    d = tl.arange(0, WIDTH)
    head = group * SHARED + shared
    live = (shared < SHARED)[:, None]
    q_SD = tl.load(q + token * q_token + head[:, None] * q_head + d[None, :], mask=live, other=0.0)
    position = tl.zeros((SHARED_TILE,), tl.int32) + context
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, context // BLOCK + 1)
    total, most, norm = _attend(
        q_SD, tl.zeros((SHARED_TILE, WIDTH), tl.float32),
        tl.full((SHARED_TILE,), -1e30, tl.float32), tl.zeros((SHARED_TILE,), tl.float32),
        keys, values, blocks + sequence * table, first, last,
        context + 1, position, groups, group, scale, True, WIDTH, BLOCK,
    )  # fmt: skip
    heads = groups * SHARED
    if WHOLE:
        out = (total / norm[:, None]).to(o.dtype.element_ty)
        tl.store(o + (token * heads + head)[:, None] * WIDTH + d[None, :], out, mask=live)
    else:
        part = (sequence * heads + head) * tl.num_programs(0) + split
        tl.store(parts + part[:, None] * WIDTH + d[None, :], total, mask=live)
        tl.store(weights + part * 2, most, mask=shared < SHARED)
        tl.store(weights + part * 2 + 1, norm, mask=shared < SHARED)


@triton.jit(do_not_specialize=["splits"])
def _join_parts(
    parts, weights, o, offsets, splits, heads, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(offsets + sequence).to(tl.int64)
    if tl.load(offsets + sequence + 1) - token != 1:
        return
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    part = (sequence * heads + head) * splits + split
    most = tl.load(weights + part * 2, mask=split < splits, other=-1e30)
    norm = tl.load(weights + part * 2 + 1, mask=split < splits, other=0.0)
    share = tl.exp2(most - tl.max(most, 0))
    each = tl.load(
        parts + part[:, None] * WIDTH + d[None, :], mask=(split < splits)[:, None], other=0.0
    )
    out = tl.sum(each * share[:, None], 0) / tl.sum(norm * share, 0)
    tl.store(o + (token * heads + head) * WIDTH + d, out.to(o.dtype.element_ty))
