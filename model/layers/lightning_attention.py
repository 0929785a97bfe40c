"""Lightning attention: linear attention whose state decays by a fixed slope for each head.

Per head, S_t = exp(-slope) S_{t-1} + k_t^T v_t and o_t = q_t S_t (MiniMax-01 technical report,
arXiv 2501.08313, section 2.2). T tokens, H heads, K = V = D head dimensions, N tokens of a piece.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from model.config import TextConfig
from model.layers.dispatch import attention_kernels
from model.layers.linear import Linear, Quantization
from model.layers.memory import LayerMemory
from model.layers.norm import RMSNorm, gated_norm
from model.layers.ragged import BLOCK_TOKENS, Piece, RaggedBatch
from model.layers.states import States

_NORM_EPS = 1e-6  # of the norm inside the layer; the released code does not read it from the config


def lightning_slopes(layer: int, text: TextConfig) -> Tensor:
    """fp32 [H] decay rates of a layer: 2^(-8 (h + 1) / H), smaller the deeper the layer.

    `layer` is the global index, also in a rank that holds only some of the layers.
    """
    heads = torch.arange(1, text.num_heads + 1, dtype=torch.float32)
    depth = 1 - layer / max(text.num_layers - 1, 1) + 1e-5
    return 2 ** (-8 * heads / text.num_heads) * depth


def lightning_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    slopes_H: Tensor,
    states: States,
    batch: RaggedBatch,
    recent_SHxRD: Tensor | None = None,
) -> Tensor:
    """Attend, and update the states in place. Returns o [T, H, D] in the dtype of q.

    A sequence without context starts from zero, whatever its slot held before. recent_SHxRD: as in
    LayerMemory, for the kernels, which need it. Pieces of one token (all of decode) take the
    recurrence as it is written above, longer ones the block form, which is the same sum in another
    order.
    """
    if kernels := attention_kernels(q_THD):
        return kernels.lightning_attention(
            q_THD, k_THD, v_THD, slopes_H, states, batch, recent_SHxRD
        )
    for pool in states.tensors:
        pool[batch.slots_S[batch.contexts_S == 0]] = 0
    decays = _Decays(slopes_H)
    o_THD = torch.empty_like(q_THD)
    decoding: list[Piece] = []
    for piece in batch.pieces():
        if batch.lengths[piece.sequence] == 1:
            decoding.append(piece)
        elif piece.length == 1:
            _step(q_THD, k_THD, v_THD, decays, states, batch, [piece], o_THD)
        else:
            _block(q_THD, k_THD, v_THD, decays, states, batch, piece, o_THD)
    if decoding:
        _step(q_THD, k_THD, v_THD, decays, states, batch, decoding, o_THD)
    return o_THD


class _Decays:
    """exp(-slope * distance) for the distances inside a block, fp32."""

    def __init__(self, slopes_H: Tensor) -> None:
        self._slopes_H = slopes_H
        self.one_H = torch.exp(-slopes_H)

    @cached_property
    def by_distance_HN(self) -> Tensor:
        distances = torch.arange(BLOCK_TOKENS + 1, device=self._slopes_H.device)
        return torch.exp(-self._slopes_H[:, None] * distances)

    @cached_property
    def causal_HNN(self) -> Tensor:
        rows = torch.arange(BLOCK_TOKENS, device=self._slopes_H.device)
        distances = rows[:, None] - rows
        return self.by_distance_HN[:, distances.clamp(min=0)] * (distances >= 0)


def _block(q_THD, k_THD, v_THD, decays, states: States, batch, piece: Piece, o_THD) -> None:
    """o_i = exp(-s (i + 1)) q_i S + sum over j <= i of exp(-s (i - j)) (q_i k_j) v_j."""
    n, rows = piece.length, slice(piece.start, piece.start + piece.length)
    q, k, v = (x[rows].transpose(0, 1).float() for x in (q_THD, k_THD, v_THD))  # [H, N, D]
    slot = batch.slots_S[piece.sequence, None]
    (state_HKV,) = states.read(slot)
    since_start_HN1 = decays.by_distance_HN[:, 1 : n + 1, None]
    until_end_HN1 = decays.by_distance_HN[:, :n, None].flip(1)
    weights_HNN = (q @ k.transpose(1, 2)) * decays.causal_HNN[:, :n, :n]
    o_HND = weights_HNN @ v + (q * since_start_HN1) @ state_HKV
    o_THD[rows] = o_HND.transpose(0, 1).to(o_THD.dtype)
    update_HKV = (k * until_end_HN1).transpose(1, 2) @ v
    state_HKV = decays.by_distance_HN[:, n, None, None] * state_HKV + update_HKV
    states.write(slot, state_HKV[None])


def _step(q_THD, k_THD, v_THD, decays, states: States, batch, pieces, o_THD) -> None:
    """One token each of several sequences."""
    rows = [piece.start for piece in pieces]
    slots = batch.slots_S[[piece.sequence for piece in pieces]]
    q, k, v = (x[rows].float() for x in (q_THD, k_THD, v_THD))
    state_NHKV = decays.one_H[:, None, None] * states.read(slots)
    state_NHKV += k[..., :, None] * v[..., None, :]
    states.write(slots, state_NHKV)
    o_THD[rows] = (q[..., None, :] @ state_NHKV).squeeze(-2).to(o_THD.dtype)


class LightningAttention(nn.Module):
    """The sub-layer around it: qkv with silu, norm over all heads, output gate, projection."""

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
        width = text.num_heads * text.head_dim
        where: Any = {"dtype": dtype, "device": device}
        how: Any = {**where, "quantization": quantization}
        self.layer = layer
        self.heads, self.head_dim = text.num_heads, text.head_dim
        self.qkv_proj = Linear(text.hidden_size, 3 * width, **how)
        self.output_gate = Linear(text.hidden_size, width, **how)
        self.norm = RMSNorm(width, _NORM_EPS, **where)
        self.out_proj = Linear(width, text.hidden_size, **how)
        self.slopes_H = lightning_slopes(layer, text).to(device)

    def forward(self, x_TD: Tensor, batch: RaggedBatch, memory: LayerMemory) -> Tensor:
        qkv = self.qkv_proj(x_TD, silu=True).view(-1, self.heads, 3 * self.head_dim)
        q_THD, k_THD, v_THD = qkv.split(self.head_dim, dim=-1)
        o_THD = lightning_attention(
            q_THD,
            k_THD,
            v_THD,
            self.slopes_H,
            memory.states[self.layer],
            batch,
            memory.recent[self.layer],
        )
        gate_TD = self.output_gate(x_TD)
        return self.out_proj(gated_norm(o_THD.flatten(1), gate_TD, self.norm.weight, self.norm.eps))
