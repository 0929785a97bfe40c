"""Device memory of one rank: the pools that its attention layers read and write in place.

Which slot or block belongs to whom is decided elsewhere.
Shapes: S slots, H heads, K and V head dimensions, B blocks, P positions of a block, G kv heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from model.config import TextConfig
from model.layers.dispatch import packs_states
from model.layers.ragged import BLOCK_TOKENS
from model.layers.states import States, state_bytes

# On a GPU a state is half of what decoding moves for it: read for every token, but written for one
# in so many, for which the tokens since then wait beside it. Divides BLOCK_TOKENS.
RECENT_TOKENS = 8


@dataclass(frozen=True)
class SavedSequence:
    """What a rank remembers of one sequence, on the host: layer index -> CPU tensors."""

    states: dict[int, tuple[Tensor, ...]]  # as in States, of one slot
    recent: dict[int, Tensor]  # [H, 2, RECENT_TOKENS, K]
    keys: dict[int, Tensor]  # [B, P, G, K], the sequence's blocks in order
    values: dict[int, Tensor]


class LayerMemory:
    """Lightning states and K/V blocks of the layers in `span` (global layer indices).

    states: layer -> States of all slots, packed for the kernels.
    recent: layer -> [slots, heads, 2, RECENT_TOKENS, head_dim], keys and values; kernels hold the
        tokens after the last multiple of RECENT_TOKENS there, and a state has those before.
    keys, values: layer -> [blocks, BLOCK_TOKENS, kv heads, head_dim].
    """

    def __init__(
        self,
        text: TextConfig,
        span: range,
        *,
        slots: int,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        block_shape, size = _block_shape(text), text.head_dim
        packed = packs_states(dtype, torch.device(device), size)
        lightning, softmax = _split(text, span)
        self.states = {
            i: States.empty(slots, text.num_heads, size, device, packed=packed) for i in lightning
        }
        recent_shape = _recent_shape(text)
        self.recent = {
            i: torch.zeros(slots, *recent_shape, dtype=dtype, device=device) for i in lightning
        }
        self.keys = {
            i: torch.zeros(blocks, *block_shape, dtype=dtype, device=device) for i in softmax
        }
        self.values = {i: torch.zeros_like(keys) for i, keys in self.keys.items()}

    def save(self, slot: int, blocks: Sequence[int]) -> SavedSequence:
        """Copy a sequence's slot and blocks to the host, bit for bit."""
        index = list(blocks)
        return SavedSequence(
            # clone(): on a CPU, .cpu() alone would alias the pool.
            states={
                i: tuple(pool[slot].clone().cpu() for pool in states.tensors)
                for i, states in self.states.items()
            },
            recent={i: pool[slot].clone().cpu() for i, pool in self.recent.items()},
            keys={i: pool[index].cpu() for i, pool in self.keys.items()},
            values={i: pool[index].cpu() for i, pool in self.values.items()},
        )

    def restore(self, slot: int, blocks: Sequence[int], saved: SavedSequence) -> None:
        """Write a saved sequence into a slot and as many blocks as it had, which may be others."""
        index = list(blocks)
        for i, tensors in saved.states.items():
            for pool, tensor in zip(self.states[i].tensors, tensors, strict=True):
                pool[slot] = tensor.to(pool.device)
        for i, recent in saved.recent.items():
            self.recent[i][slot] = recent.to(self.recent[i].device)
        for i, keys in saved.keys.items():
            self.keys[i][index] = keys.to(self.keys[i].device)
        for i, values in saved.values.items():
            self.values[i][index] = values.to(self.values[i].device)


def slot_bytes(text: TextConfig, span: range, dtype: torch.dtype, *, packed: bool) -> int:
    """Bytes of one lightning slot over the layers in `span`; packed: on a GPU with kernels."""
    lightning, _ = _split(text, span)
    state = state_bytes(text.num_heads, text.head_dim, packed=packed)
    return len(lightning) * (state + prod(_recent_shape(text)) * dtype.itemsize)


def block_bytes(text: TextConfig, span: range, dtype: torch.dtype) -> int:
    """Bytes of one K/V block, keys and values, over the layers in `span`."""
    _, softmax = _split(text, span)
    return len(softmax) * 2 * prod(_block_shape(text)) * dtype.itemsize


def _split(text: TextConfig, span: range) -> tuple[list[int], list[int]]:
    lightning = [i for i in span if text.layer_types[i] == "lightning"]
    return lightning, [i for i in span if text.layer_types[i] == "softmax"]


def _recent_shape(text: TextConfig) -> tuple[int, ...]:
    return text.num_heads, 2, RECENT_TOKENS, text.head_dim


def _block_shape(text: TextConfig) -> tuple[int, ...]:
    return BLOCK_TOKENS, text.num_kv_heads, text.head_dim
