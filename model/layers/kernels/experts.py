"""The experts of every token: rows grouped by expert on the device, two grouped products, a sum.

T tokens, K experts of a token, R = T * K rows (row r is choice r % K of token r // K), E experts,
D hidden, F expert width. Nothing here waits for the device: grids are sized for the worst split of
rows over experts, and programs past the real one leave at once. No atomics: the same input gives
the same bits.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.config import Residual
from model.layers.kernels.int8 import load_weight, settle
from model.layers.kernels.linear import prompts


@dataclass(frozen=True)
class GroupedConfig:
    rows: int  # of the weight in a tile (of each of w1 and w3)
    tokens: int  # rows of x in a tile
    columns: int  # of the weight a step
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpertsConfig:
    w13: GroupedConfig
    w2: GroupedConfig


# Up to so many rows an expert; measured on an H100 with 32 experts of 9216 x 6144.
CONFIGS = (
    (10, ExpertsConfig(GroupedConfig(32, 16, 256, 4, 3), GroupedConfig(64, 16, 256, 4, 3))),
    (20, ExpertsConfig(GroupedConfig(64, 32, 128, 8, 3), GroupedConfig(128, 32, 128, 8, 3))),
    (96, ExpertsConfig(GroupedConfig(64, 64, 128, 8, 3), GroupedConfig(128, 64, 128, 4, 3))),
    (192, ExpertsConfig(GroupedConfig(64, 64, 128, 8, 3), GroupedConfig(128, 128, 128, 8, 3))),
    (1 << 62, ExpertsConfig(GroupedConfig(64, 128, 64, 4, 4), GroupedConfig(128, 128, 64, 4, 4))),
)
# Rows an expert. From so many on, prompts.py is faster (2.02 against 2.09 ms at 16, 2.06 against
# 2.41 at 24; 1.98 against 1.94 at 8).
LEAST_ROWS = 12
SORT_ROWS = 256
# Parts of so many rows that a decode step has at most. One kernel for all these, and one for most
# prompts: each takes a second to compile.
_DECODE_PARTS = 8


def experts(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor,
    w13_EFD: Tensor, w13_scale_EF1: Tensor | None, w2_EDF: Tensor, w2_scale_ED1: Tensor | None,
    *, residual: Residual | None = None, quantize_x: bool = False,
    config: ExpertsConfig | None = None,
) -> Tensor:  # fmt: skip
    """Weighted sum over each token's experts of w2(silu(w1 x) * w3 x), added to x by `residual` if
    there is one -> y_TD bf16.

    x_TD bf16; experts_TK int64; weights_TK fp32; w13 [E, 2F, D] (first w1, the gate, then w3) and
    w2 [E, D, F] int8 with bf16 scales per row, or bf16 with None. D and F must be multiples of 32.
    quantize_x lets the inputs of both products be rounded to int8 where that is faster.
    """
    tokens, hidden = x_TD.shape
    count, doubled, _ = w13_EFD.shape
    width = doubled // 2
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    if tokens == 0:
        return y_TD
    x_TD = x_TD.contiguous()
    rows = experts_TK.numel()
    if max(x_TD.numel(), rows * width) >= 1 << 31:
        raise ValueError(f"{rows} rows of {width}; the kernels index them with 32 bits")
    y_RD = torch.empty(rows, hidden, device=x_TD.device, dtype=x_TD.dtype)
    grouped = group_rows(experts_TK, count)
    choices, weights_TK = experts_TK.shape[1], weights_TK.contiguous()
    quantized = w13_scale_EF1 is not None and config is None
    fits = quantized and prompts and prompts.can_multiply(hidden, width)
    if fits and LEAST_ROWS * count <= rows:
        prompts.experts(
            x_TD, w13_EFD, w13_scale_EF1, w2_EDF, w2_scale_ED1, y_RD, grouped, weights_TK,
            quantize_x=quantize_x,
        )  # fmt: skip
    else:
        h_RF = torch.empty(rows, width, device=x_TD.device, dtype=x_TD.dtype)
        config = config or next(c for most, c in CONFIGS if rows <= most * count)
        _launch(_gate_up, config.w13, grouped, x_TD, w13_EFD, w13_scale_EF1, h_RF, width, hidden,
                CHOICES=choices)  # fmt: skip
        _launch(_down, config.w2, grouped, h_RF, w2_EDF, w2_scale_ED1, y_RD, hidden, width,
                route_weights=weights_TK)  # fmt: skip
    block = 1024
    _sum_choices[(tokens, triton.cdiv(hidden, block))](
        y_RD,
        x_TD,
        y_TD,
        hidden,
        residual.alpha if residual else 0.0,
        residual.beta if residual else 1.0,
        CHOICES=choices,
        BLOCK=block,
        ADDED=residual is not None,
    )
    return y_TD


@dataclass(frozen=True)
class GroupedRows:
    rows_R: Tensor  # int32: rows in the order of their experts, in their own order within one
    ends_E: Tensor  # int32: where each expert's rows end in rows_R

    @property
    def experts(self) -> int:
        return self.ends_E.shape[0]

    def most_tiles(self, tile: int) -> int:
        """Tiles of `tile` rows that are enough however the rows fall on the experts."""
        rows = self.rows_R.shape[0]
        return (rows + min(self.experts, rows) * (tile - 1)) // tile

    def tiles(self, tile: int) -> tuple[Tensor, Tensor]:
        """int32 [most_tiles, 3]: (expert, first, end row) of each tile; and their number [1]."""
        most = self.most_tiles(tile)
        tiles_W3 = torch.empty(most, 3, device=self.ends_E.device, dtype=torch.int32)
        count_1 = torch.empty(1, device=self.ends_E.device, dtype=torch.int32)
        block = 128
        _list_tiles[(triton.cdiv(most, block),)](
            self.ends_E, tiles_W3, count_1, self.experts, most, tile, BLOCK=block,
            EXPERTS=triton.next_power_of_2(self.experts),
        )  # fmt: skip
        return tiles_W3, count_1


def group_rows(experts_TK: Tensor, count: int) -> GroupedRows:
    """Stable counting sort of the rows by expert, in two launches."""
    chosen_R = experts_TK.reshape(-1)
    rows = chosen_R.shape[0]
    parts = triton.cdiv(rows, SORT_ROWS)
    padded = triton.next_power_of_2(count)
    device = chosen_R.device
    counts_PE = torch.empty(parts, padded, device=device, dtype=torch.int32)
    rows_R = torch.empty(rows, device=device, dtype=torch.int32)
    ends_E = torch.empty(count, device=device, dtype=torch.int32)
    sizes = {"EXPERTS": padded, "ROWS": SORT_ROWS}
    _count_rows[(parts,)](chosen_R, counts_PE, rows, **sizes)
    _place_rows[(parts,)](
        chosen_R,
        counts_PE,
        rows_R,
        ends_E,
        rows,
        count,
        PARTS=_DECODE_PARTS if parts <= _DECODE_PARTS else max(128, triton.next_power_of_2(parts)),
        **sizes,
    )
    return GroupedRows(rows_R, ends_E)


def _launch(kernel, config, grouped, x, weight_ENK, scale_EN1, out, outputs, width, **more):
    """One grouped product over all experts; `width` is summed over, `out` has `outputs` columns."""
    quantized = scale_EN1 is not None
    tiles = grouped.most_tiles(config.tokens)
    kernel[(tiles * triton.cdiv(outputs, config.rows),)](
        x, weight_ENK.view(torch.int16) if quantized else weight_ENK,
        scale_EN1 if quantized else x, out,
        grouped.rows_R, grouped.ends_E, outputs, grouped.experts, **more,
        K=width, ROWS=config.rows, TOKENS=config.tokens,
        COLUMNS=min(config.columns, width & -width),
        EXPERTS=triton.next_power_of_2(grouped.experts), QUANTIZED=quantized,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _count_rows(chosen, counts, rows, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.load(chosen + row, mask=row < rows, other=-1).to(tl.int32)
    each = tl.arange(0, EXPERTS)
    hits = (expert[:, None] == each[None, :]).to(tl.int32)
    tl.store(counts + tl.program_id(0) * EXPERTS + each, tl.sum(hits, 0))


@triton.jit(do_not_specialize=["rows"])
def _place_rows(
    chosen, counts, sorted_rows, ends, rows, count,
    PARTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = tl.arange(0, PARTS)
    each = tl.arange(0, EXPERTS)
    counts_PE = tl.load(
        counts + part[:, None] * EXPERTS + each[None, :],
        mask=(part < tl.num_programs(0))[:, None],
        other=0,
    )
    total = tl.sum(counts_PE, 0)
    end = tl.cumsum(total, 0)
    earlier = tl.sum(tl.where((part < program)[:, None], counts_PE, 0), 0)
    first = end - total + earlier
    if program == 0:
        tl.store(ends + each, end, mask=each < count)

    row = program * ROWS + tl.arange(0, ROWS)
    expert = tl.load(chosen + row, mask=row < rows, other=-1).to(tl.int32)
    hits = (expert[:, None] == each[None, :]).to(tl.int32)
    place = tl.sum(hits * (tl.cumsum(hits, 0) - 1 + first[None, :]), 1)
    tl.store(sorted_rows + place, row, mask=row < rows)


@triton.jit(do_not_specialize=["most", "tile"])
def _list_tiles(
    ends, tiles, tile_count, count, most, tile, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """An expert's tiles follow each other; those past the last are of an expert that is none."""
    each = tl.arange(0, EXPERTS)
    end = tl.load(ends + each, mask=each < count, other=0)
    start = tl.load(ends + each - 1, mask=(each > 0) & (each < count), other=0)
    number = tl.where(each < count, (end - start + tile - 1) // tile, 0)
    last = tl.cumsum(number, 0)
    work = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    passed = (last[None, :] <= work[:, None]) & (each < count)[None, :]
    expert = tl.sum(passed.to(tl.int32), 1)
    mine = each[None, :] == expert[:, None]
    before = tl.sum(tl.where(mine, start - (last - number) * tile, 0), 1)
    live = work < most
    tl.store(tiles + 3 * work, expert, mask=live)
    tl.store(tiles + 3 * work + 1, before + work * tile, mask=live)
    tl.store(tiles + 3 * work + 2, tl.sum(tl.where(mine, end, 0), 1), mask=live)
    if tl.program_id(0) == 0:
        tl.store(tile_count, tl.sum(number, 0))


@triton.jit
def _find_tile(program, ends, blocks, count, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, block of weight rows, first row, end row); expert == count past the last tile.

    All tiles of one block of one expert's weight follow each other, so that the block is read from
    memory once; an expert's blocks follow each other, so that its rows of x stay in the L2 cache.
    """
    each = tl.arange(0, EXPERTS)
    end = tl.load(ends + each, mask=each < count, other=0)
    start = tl.load(ends + each - 1, mask=(each > 0) & (each < count), other=0)
    tiles = tl.where(each < count, (end - start + TOKENS - 1) // TOKENS, 0)
    tile_end = tl.cumsum(tiles, 0)
    expert = tl.sum(((tile_end * blocks <= program) & (each < count)).to(tl.int32), 0)
    mine = each == expert
    expert_tiles = tl.maximum(tl.sum(tl.where(mine, tiles, 0), 0), 1)
    within = program - (tl.sum(tl.where(mine, tile_end, 0), 0) - expert_tiles) * blocks
    first = tl.sum(tl.where(mine, start, 0), 0) + (within % expert_tiles) * TOKENS
    return expert, within // expert_tiles, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _multiply(
    x, row, weight, n, K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, QUANTIZED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """W[n] x[row]^T -> fp32 [ROWS, TOKENS], not yet scaled.

    K is a constant: ptxas waits for every single wgmma where the trip count of a loop is unknown.
    """
    stored = tl.arange(0, COLUMNS // PACKED)
    places = n[:, None] * (K // PACKED) + stored[None, :]
    x_places = row[None, :] * K + tl.arange(0, COLUMNS)[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for _ in range(0, K, COLUMNS):
        total = tl.dot(
            load_weight(weight + places, QUANTIZED, ROWS, COLUMNS), tl.load(x + x_places), total
        )
        total = settle(total)
        weight += COLUMNS // PACKED
        x += COLUMNS
    return total


@triton.jit
def _gate_up(
    x, weight, scale, h, sorted_rows, ends, N, count, K: tl.constexpr,
    CHOICES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """h[sorted row] = silu(w1 x) * w3 x; a weight tile is ROWS of w1 above ROWS of w3."""
    expert, block, first, end = _find_tile(
        tl.program_id(0), ends, tl.cdiv(N, ROWS), count, TOKENS, EXPERTS
    )
    if expert >= count:
        return
    PACKED: tl.constexpr = 2 if QUANTIZED else 1
    row = first + tl.arange(0, TOKENS)
    token = tl.load(sorted_rows + row, mask=row < end, other=0) // CHOICES
    both = tl.arange(0, 2 * ROWS)
    n_read = tl.minimum(block * ROWS + both % ROWS, N - 1) + both // ROWS * N
    weight += expert.to(tl.int64) * (2 * N * (K // PACKED))
    scale += expert * 2 * N
    total = _multiply(x, token, weight, n_read, K, 2 * ROWS, TOKENS, COLUMNS, QUANTIZED, PACKED)
    if QUANTIZED:
        total *= tl.load(scale + n_read).to(tl.float32)[:, None]
    gate, up = tl.split(tl.permute(total.reshape(2, ROWS, TOKENS), (1, 2, 0)))
    value = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
    n = block * ROWS + tl.arange(0, ROWS)
    places = row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(h + places, tl.trans(value), mask=(row < end)[:, None] & (n < N)[None, :])


@triton.jit
def _down(
    h, weight, scale, y, sorted_rows, ends, N, count, route_weights, K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """y[original row] = routing weight * w2 h[sorted row]."""
    expert, block, first, end = _find_tile(
        tl.program_id(0), ends, tl.cdiv(N, ROWS), count, TOKENS, EXPERTS
    )
    if expert >= count:
        return
    PACKED: tl.constexpr = 2 if QUANTIZED else 1
    row = first + tl.arange(0, TOKENS)
    row_read = tl.minimum(row, end - 1)
    original = tl.load(sorted_rows + row_read)
    n = block * ROWS + tl.arange(0, ROWS)
    n_read = tl.minimum(n, N - 1)
    weight += expert.to(tl.int64) * (N * (K // PACKED))
    scale += expert * N
    total = _multiply(h, row_read, weight, n_read, K, ROWS, TOKENS, COLUMNS, QUANTIZED, PACKED)
    if QUANTIZED:
        total *= tl.load(scale + n_read).to(tl.float32)[:, None]
    total *= tl.load(route_weights + original)[None, :]
    places = original.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(
        y + places,
        tl.trans(total.to(y.dtype.element_ty)),
        mask=(row < end)[:, None] & (n < N)[None, :],
    )


@triton.jit
def _sum_choices(
    y_rows, x, y, D, alpha, beta, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        total += tl.load(y_rows + (token * CHOICES + choice) * D + d, mask=d < D, other=0.0)
    if ADDED:
        value = tl.load(x + token * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = alpha * value + beta * total
    tl.store(y + token * D + d, total.to(y.dtype.element_ty), mask=d < D)
