"""Rotary position embedding on the first dimensions of each head.

T tokens, H heads, D head dimensions, R rotary dimensions (R <= D).
"""

import torch
from torch import Tensor


def rotary_tables(positions_T: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / R), fp32 [T, R / 2] each."""
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device)
    frequencies = 1.0 / (theta ** (steps / rotary_dim))
    angles = positions_T[:, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotary(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head, as pairs (i, i + R / 2); leave the others."""
    half = cos_TR.shape[-1]
    first, second, rest = x_THD.split([half, half, x_THD.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x_THD.dtype) for part in rotated), rest], dim=-1)
