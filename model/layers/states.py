"""The states of lightning attention in memory: as they are, or in 16 bits for each number.

S slots, H heads, K and V head dimensions, C groups of V that share a scale, N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# A key's values that share a scale: as many as one program of the kernels has in hand.
SHARED_SCALE = 64
LEVELS = 2**15 - 1


@dataclass(frozen=True)
class States:
    """One layer's, keys to values, as k^T v.

    data_SHKV: fp32; or int16, to be multiplied by scale_SHCK, fp32. So a number is kept to 2^-16 of
    the largest in its group, where the bf16 queries that meet it are rounded to 2^-9 of their own:
    half the memory, and as exact.
    """

    data_SHKV: Tensor
    scale_SHCK: Tensor | None = None

    @classmethod
    def empty(cls, slots: int, heads: int, size: int, device, *, packed: bool) -> "States":
        """Zeros. packed: int16."""
        data_SHKV = torch.zeros(
            slots, heads, size, size, dtype=torch.int16 if packed else torch.float32, device=device
        )
        if not packed:
            return cls(data_SHKV)
        scale_SHCK = torch.zeros(slots, *_scale_shape(heads, size), device=device)
        return cls(data_SHKV, scale_SHCK)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """[S, ...] each: all that is to be kept of a slot."""
        return (self.data_SHKV,) if self.scale_SHCK is None else (self.data_SHKV, self.scale_SHCK)

    def read(self, slots: Sequence[int] | Tensor) -> Tensor:
        """fp32 [N, H, K, V], a copy."""
        data_NHKV = self.data_SHKV[slots]
        if self.scale_SHCK is None:
            return data_NHKV
        scale_NHKC1 = self.scale_SHCK[slots].transpose(2, 3)[..., None]
        return (_grouped(data_NHKV).float() * scale_NHKC1).flatten(3)

    def write(self, slots: Sequence[int] | Tensor, state_NHKV: Tensor) -> None:
        """fp32, rounded to the nearest level where they are packed."""
        if self.scale_SHCK is None:
            self.data_SHKV[slots] = state_NHKV
            return
        grouped_NHKCx = _grouped(state_NHKV)
        most_NHKC1 = grouped_NHKCx.abs().amax(-1, keepdim=True)
        # A group of zeros has no levels.
        levels_NHKC1 = torch.where(most_NHKC1 == 0, 0, LEVELS / most_NHKC1)
        self.data_SHKV[slots] = (grouped_NHKCx * levels_NHKC1).round().to(torch.int16).flatten(3)
        self.scale_SHCK[slots] = (most_NHKC1 / LEVELS).squeeze(-1).transpose(2, 3)


def state_bytes(heads: int, size: int, *, packed: bool) -> int:
    """Of one slot."""
    if not packed:
        return heads * size * size * torch.float32.itemsize
    scales = prod(_scale_shape(heads, size)) * torch.float32.itemsize
    return heads * size * size * torch.int16.itemsize + scales


def _scale_shape(heads: int, size: int) -> tuple[int, int, int]:
    return heads, -(-size // SHARED_SCALE), size


def _grouped(state_NHKV: Tensor) -> Tensor:
    """[N, H, K, C, V / C]."""
    return state_NHKV.unflatten(3, (-1, min(SHARED_SCALE, state_NHKV.shape[3])))
