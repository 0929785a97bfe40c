"""The projector: features of the vision tower to embeddings of the language model."""

import torch
from torch import Tensor, nn

from model.layers.activation import gelu
from model.layers.linear import Linear


class Projector(nn.Module):
    """Linear, gelu, Linear: [M, vision width] to [M, hidden size]."""

    def __init__(
        self,
        vision_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        where = {"dtype": dtype, "device": device}
        self.linear_1 = Linear(vision_size, hidden_size, bias=True, **where)
        self.linear_2 = Linear(hidden_size, hidden_size, bias=True, **where)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(x)))
