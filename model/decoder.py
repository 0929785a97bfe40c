"""The network, or the part of it that one rank holds: tiles and tokens in, logits out.

T new tokens, N of them whose next token is wanted, D hidden size, V vocabulary, P image tokens.
Knows its own layers and nothing of the other ranks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import VL01Config
from model.inputs.tiling import choose_layout
from model.layers.lightning_attention import LightningAttention
from model.layers.linear import Linear, Quantization, empty_weight
from model.layers.memory import LayerMemory
from model.layers.moe import MixtureOfExperts
from model.layers.norm import RMSNorm, residual_norm
from model.layers.ragged import RaggedBatch
from model.layers.softmax_attention import SoftmaxAttention
from model.vision.packing import pack
from model.vision.projector import Projector
from model.vision.tower import VisionTower

_ATTENTION = {"lightning": LightningAttention, "softmax": SoftmaxAttention}


class Decoder(nn.Module):
    """The layers in `span` (global indices).

    The first rank, whose span begins at 0, also holds the embeddings, the vision tower and the
    projector; the last one the final norm and the head. Weights are allocated, not filled: see
    `model.weights.checkpoint.load_decoder`.
    """

    def __init__(
        self,
        config: VL01Config,
        span: range,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: Quantization,
    ) -> None:
        super().__init__()
        text = config.text
        where = {"dtype": dtype, "device": device}
        self.config, self.span = config, span
        self.is_first, self.is_last = 0 in span, text.num_layers - 1 in span
        if self.is_first:
            self.embed_tokens = Embedding(text.vocab_size, text.hidden_size, **where)
            self.vision_tower = VisionTower(config.vision, **where)
            self.projector = Projector(config.vision.hidden_size, text.hidden_size, **where)
            self.image_newline = empty_weight(text.hidden_size, **where)
            self._pixel_statistics = [
                torch.tensor(x, device=device) for x in (config.image_mean, config.image_std)
            ]
        self.layers = nn.ModuleDict(
            {str(i): DecoderLayer(config, i, quantization=quantization, **where) for i in span}
        )
        if self.is_last:
            self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, **where)
            self.lm_head = Linear(text.hidden_size, text.vocab_size, **where)

    @torch.inference_mode()
    def image_features(self, tiles_NSSC: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Embeddings of one image's tokens, [P, D], packed as the language model sees them.

        tiles_NSSC: uint8 [N, side, side, 3], the thumbnail first. image_size: (width, height) in
        pixels of the image they were cut from. Raises ValueError when the two do not agree.
        """
        vision = self.config.vision
        layout = choose_layout(
            *image_size, self.config.pinpoints, vision.image_size, vision.patch_size
        )
        weight = self.image_newline
        mean, std = self._pixel_statistics
        pixels = (tiles_NSSC.to(weight.device, non_blocking=True) / 255 - mean) / std
        features = self.vision_tower(pixels.to(weight.dtype))
        projected = self.projector(features.flatten(0, 1)).view(*features.shape[:2], -1)
        return pack(projected, weight, layout)

    @torch.inference_mode()
    def embed(self, ids_T: Tensor, image_features: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        """Embeddings of tokens, [T, D]; image tokens take the features given for their place.

        image_features: (row in T, features [P, D]) for every run of image tokens in `ids_T`;
        see `check_image_tokens`, which wants the ids on the host, where they come from.
        """
        hidden_TD = self.embed_tokens(ids_T)
        for start, features in image_features:
            hidden_TD[start : start + len(features)] = features
        return hidden_TD

    @torch.inference_mode()
    def forward(self, hidden_TD: Tensor, batch: RaggedBatch, memory: LayerMemory) -> Tensor:
        """Through the layers of the span, [T, D] to [T, D]; updates `memory` in place."""
        for layer in self.layers.values():
            hidden_TD = layer(hidden_TD, batch, memory)
        return hidden_TD

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 [N, V], after the final norm. An image token is never the next token: -inf."""
        logits_NV = self.lm_head(self.norm(hidden_ND)).float()
        # Written by the model it would have no features to stand for, and embed() would refuse it.
        logits_NV[:, self.config.image_token_id] = float("-inf")
        return logits_NV


def check_image_tokens(
    ids_T: np.ndarray, image_features: Sequence[tuple[int, Tensor]], image_token_id: int
) -> None:
    """Raises ValueError when the image tokens and the features do not match one to one."""
    expected_T = np.zeros(len(ids_T), dtype=bool)
    for start, features in image_features:
        expected_T[start : start + len(features)] = True
    placeholders_T = ids_T == image_token_id
    if not np.array_equal(expected_T, placeholders_T):
        given = sum(len(features) for _, features in image_features)
        raise ValueError(
            f"{placeholders_T.sum()} image tokens, {given} image features; expected a feature "
            "for every image token, in its place"
        )


class DecoderLayer(nn.Module):
    """Attention, then experts, each added to its normed input (the released `postnorm`)."""

    def __init__(
        self,
        config: VL01Config,
        layer: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: Quantization,
    ) -> None:
        super().__init__()
        text, kind = config.text, config.text.layer_types[layer]
        where = {"dtype": dtype, "device": device}
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps, **where)
        self.attention = _ATTENTION[kind](text, layer, quantization=quantization, **where)
        self.attention_residual = (
            text.lightning_residual if kind == "lightning" else text.softmax_residual
        )
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps, **where)
        self.moe = MixtureOfExperts(text, quantization=quantization, **where)

    def forward(self, x_TD: Tensor, batch: RaggedBatch, memory: LayerMemory) -> Tensor:
        x_TD = self.input_layernorm(x_TD)
        norm = self.post_attention_layernorm
        attended_TD = self.attention(x_TD, batch, memory)
        x_TD = residual_norm(x_TD, attended_TD, self.attention_residual, norm.weight, norm.eps)
        return self.moe(x_TD)


class Embedding(nn.Module):
    def __init__(
        self, count: int, size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = empty_weight(count, size, dtype=dtype, device=device)

    def forward(self, ids_T: Tensor) -> Tensor:
        return functional.embedding(ids_T, self.weight)
