"""The CLIP vision tower: tiles in, features of the last encoder layer out.

N tiles, S side of a tile in pixels, P patches of a tile, T = P + 1 tokens (class token first),
W width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import VisionConfig
from model.layers.activation import gelu
from model.layers.linear import Linear, empty_weight, linear


class VisionTower(nn.Module):
    """ViT-L/14 at 336 px in the released checkpoint; there is no norm after the last layer."""

    def __init__(
        self, vision: VisionConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        where = {"dtype": dtype, "device": device}
        width, patch, patches = vision.hidden_size, vision.patch_size, vision.patches_per_side**2
        self.class_embedding = empty_weight(width, **where)
        self.patch_embedding = empty_weight(width, 3, patch, patch, **where)
        self.position_embedding = empty_weight(patches + 1, width, **where)
        self.norm = LayerNorm(width, vision.layer_norm_eps, **where)
        self.layers = nn.ModuleList(VisionLayer(vision, **where) for _ in range(vision.num_layers))

    def forward(self, pixels_NSSC: Tensor) -> Tensor:
        """Normalised pixels [N, S, S, 3] to the features of their patches, [N, P, W]."""
        x_NTW = self.embed(pixels_NSSC)
        for layer in self.layers:
            x_NTW = layer(x_NTW)
        return x_NTW[:, 1:]

    def embed(self, pixels_NSSC: Tensor) -> Tensor:
        """What the first layer takes, [N, T, W]."""
        patches_NPW = self._embed_patches(pixels_NSSC)
        class_N1W = self.class_embedding.expand(len(patches_NPW), 1, -1)
        return self.norm(torch.cat([class_N1W, patches_NPW], dim=1) + self.position_embedding)

    def _embed_patches(self, pixels_NSSC: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is one product over flattened patches.
        width, _, side, _ = self.patch_embedding.shape
        patches = pixels_NSSC.unfold(1, side, side).unfold(2, side, side)  # [N, rows, columns, ...
        x_NPW = linear(patches.flatten(3).flatten(0, 2), self.patch_embedding.flatten(1))
        return x_NPW.view(len(pixels_NSSC), -1, width)


class VisionLayer(nn.Module):
    """Pre-norm encoder layer: attention over all tokens of a tile, then gelu MLP."""

    def __init__(
        self, vision: VisionConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        where = {"dtype": dtype, "device": device}
        width, inner = vision.hidden_size, vision.intermediate_size
        self.heads = vision.num_heads
        self.layer_norm1 = LayerNorm(width, vision.layer_norm_eps, **where)
        self.qkv_proj = Linear(width, 3 * width, bias=True, **where)
        self.out_proj = Linear(width, width, bias=True, **where)
        self.layer_norm2 = LayerNorm(width, vision.layer_norm_eps, **where)
        self.fc1 = Linear(width, inner, bias=True, **where)
        self.fc2 = Linear(inner, width, bias=True, **where)

    def forward(self, x_NTW: Tensor) -> Tensor:
        tiles = len(x_NTW)
        x_MW = x_NTW.flatten(0, 1)  # M = N * T, all tokens of all tiles
        x_MW = x_MW + self.out_proj(self._attend(self.layer_norm1(x_MW), tiles))
        x_MW = x_MW + self.fc2(gelu(self.fc1(self.layer_norm2(x_MW))))
        return x_MW.view(x_NTW.shape)

    def _attend(self, x_MW: Tensor, tiles: int) -> Tensor:
        qkv = self.qkv_proj(x_MW).view(tiles, -1, 3, self.heads, x_MW.shape[-1] // self.heads)
        q_NHTD, k_NHTD, v_NHTD = qkv.permute(2, 0, 3, 1, 4)
        o_NHTD = functional.scaled_dot_product_attention(q_NHTD, k_NHTD, v_NHTD)
        return o_NHTD.transpose(1, 2).reshape(x_MW.shape)


class LayerNorm(nn.Module):
    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = empty_weight(size, dtype=dtype, device=device)
        self.bias = empty_weight(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
