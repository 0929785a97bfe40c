"""Mistakes that leave text looking like text, made on purpose: a measure of quality must see them.

Each is done to the layers of one rank, in place, and to nothing where that rank does not hold what
it is about.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.decoder import Decoder
from model.layers.lightning_attention import LightningAttention, lightning_slopes
from model.layers.softmax_attention import SoftmaxAttention

Fault = Callable[[Decoder], None]

# Not one in the middle: those, as trained, read as well with the slopes of their neighbours.
SLOPE_LAYER = 1


def tiles_in_wrong_order(decoder: Decoder) -> None:
    """From the last to the first, after the thumbnail."""
    if not decoder.is_first:
        return
    see = decoder.image_features

    def image_features(tiles_NSSC: Tensor, image_size: tuple[int, int]) -> Tensor:
        return see(torch.cat([tiles_NSSC[:1], tiles_NSSC[1:].flip(0)]), image_size)

    decoder.image_features = image_features


def image_newline_dropped(decoder: Decoder) -> None:
    """Nothing tells where a row of patches ends; its place is kept, or no prompt would fit."""
    if decoder.is_first:
        decoder.image_newline.zero_()


def slope_of_one_layer_wrong(decoder: Decoder) -> None:
    """The second layer forgets as the last but one does: as if layers were counted from the end."""
    if SLOPE_LAYER in decoder.span:
        attention, text = decoder.layers[str(SLOPE_LAYER)].attention, decoder.config.text
        assert isinstance(attention, LightningAttention)
        slopes_H = lightning_slopes(text.num_layers - 1 - SLOPE_LAYER, text)
        attention.slopes_H = slopes_H.to(attention.slopes_H.device)


def rotary_on_all_dimensions(decoder: Decoder) -> None:
    """Also on the half of each head that carries no position."""
    for layer in decoder.layers.values():
        if isinstance(layer.attention, SoftmaxAttention):
            layer.attention.rotary_dim = layer.attention.head_dim


FAULTS: dict[str, Fault] = {
    "tiles in wrong order": tiles_in_wrong_order,
    "`image_newline` dropped": image_newline_dropped,
    "slope of one layer wrong": slope_of_one_layer_wrong,
    "rotary on all dimensions": rotary_on_all_dimensions,
}
