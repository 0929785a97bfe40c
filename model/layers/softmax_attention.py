"""Softmax attention over K/V kept in blocks: grouped queries, rotary on part of each head.

T tokens, H query heads, G kv heads, R = H / G, D head dimensions, B blocks, P positions of a
block, L positions attended to, N tokens of a piece.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.config import TextConfig
from model.layers.dispatch import attention_kernels, kernels
from model.layers.linear import Linear, Quantization
from model.layers.memory import LayerMemory
from model.layers.ragged import BLOCK_TOKENS, Piece, RaggedBatch
from model.layers.rotary import rotary, rotary_tables


def paged_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    keys_BPGD: Tensor,
    values_BPGD: Tensor,
    batch: RaggedBatch,
) -> Tensor:
    """Write the new k and v into their blocks, then attend causally. Returns o [T, H, D].

    The scale is 1 / sqrt(D); products and softmax are computed in fp32.
    """
    if fast := attention_kernels(q_THD):
        return fast.paged_attention(q_THD, k_TGD, v_TGD, keys_BPGD, values_BPGD, batch)
    _write(k_TGD, keys_BPGD, batch)
    _write(v_TGD, values_BPGD, batch)
    o_THD = torch.empty_like(q_THD)
    sequence, keys_GLD, values_GLD = -1, q_THD, q_THD
    for piece in batch.pieces():
        if piece.sequence != sequence:
            sequence = piece.sequence
            keys_GLD = _read(keys_BPGD, batch, sequence)
            values_GLD = _read(values_BPGD, batch, sequence)
        rows = slice(piece.start, piece.start + piece.length)
        o_THD[rows] = _attend(q_THD[rows], keys_GLD, values_GLD, piece)
    return o_THD


def _write(new_TGD: Tensor, pool_BPGD: Tensor, batch: RaggedBatch) -> None:
    lengths_S = batch.offsets_S1.diff()
    sequences_T = torch.repeat_interleave(
        torch.arange(len(batch.lengths), device=lengths_S.device), lengths_S
    )
    blocks_T = batch.blocks_SB[sequences_T, batch.positions_T // BLOCK_TOKENS].long()
    pool_BPGD[blocks_T, batch.positions_T % BLOCK_TOKENS] = new_TGD


def _read(pool_BPGD: Tensor, batch: RaggedBatch, sequence: int) -> Tensor:
    """fp32 [G, L, D] of one sequence, whole blocks, zero after its last token."""
    end = batch.contexts[sequence] + batch.lengths[sequence]
    blocks_B = batch.blocks_SB[sequence, : -(-end // BLOCK_TOKENS)].long()
    x_LGD = pool_BPGD[blocks_B].flatten(0, 1)
    # What another sequence left there is masked out of the softmax, but 0 * inf would be NaN.
    x_LGD[end:] = 0
    return x_LGD.transpose(0, 1).float().contiguous()


def _attend(q_NHD: Tensor, keys_GLD: Tensor, values_GLD: Tensor, piece: Piece) -> Tensor:
    """One piece against the blocks up to its own. All shapes here follow from its position."""
    n, heads, dim = q_NHD.shape
    groups = len(keys_GLD)
    start = piece.position // BLOCK_TOKENS * BLOCK_TOKENS  # of the block the piece lies in
    keys, values = (x[:, : start + BLOCK_TOKENS] for x in (keys_GLD, values_GLD))
    # [N, H, D] -> [G, R * N, D]: the R query heads of a kv head are one product with it.
    q = q_NHD.view(n, groups, -1, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)
    q = q.float() * dim**-0.5
    scores = (q @ keys.transpose(1, 2)).view(groups, -1, n, keys.shape[1])
    offset = piece.position - start
    offsets = torch.arange(BLOCK_TOKENS, device=q.device)
    future_NP = offsets > (offset + offsets[:n])[:, None]
    scores[..., start:].masked_fill_(future_NP, float("-inf"))
    o = torch.softmax(scores, dim=-1).flatten(1, 2) @ values
    o_NHD = o.view(groups, -1, n, dim).permute(2, 0, 1, 3).reshape(n, heads, dim)
    return o_NHD.to(q_NHD.dtype)


class SoftmaxAttention(nn.Module):
    """The sub-layer around it: one projection for q, k and v, rotary, output projection."""

    def __init__(
        self,
        text: TextConfig,
        layer: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: Quantization,
    ) -> None:
        super().__init__()
        width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        how: Any = {"dtype": dtype, "device": device, "quantization": quantization}
        self.layer = layer
        self.heads, self.head_dim = (text.num_heads, text.num_kv_heads), text.head_dim
        self.rotary_dim, self.rope_theta = text.rotary_dim, text.rope_theta
        self.qkv_proj = Linear(text.hidden_size, width + 2 * kv_width, **how)
        self.out_proj = Linear(width, text.hidden_size, **how)

    def forward(self, x_TD: Tensor, batch: RaggedBatch, memory: LayerMemory) -> Tensor:
        heads, groups = self.heads
        qkv = self.qkv_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        qk, v_TGD = qkv.split((heads + groups, groups), dim=1)
        cos_TR, sin_TR = rotary_tables(batch.positions_T, self.rotary_dim, self.rope_theta)
        turn = fast.rotary if (fast := kernels(x_TD)) else rotary
        q_THD, k_TGD = turn(qk, cos_TR, sin_TR).split((heads, groups), dim=1)
        keys, values = memory.keys[self.layer], memory.values[self.layer]
        o_THD = paged_attention(q_THD, k_TGD, v_TGD, keys, values, batch)
        return self.out_proj(o_THD.flatten(1))
