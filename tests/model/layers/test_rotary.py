"""Rotary on the first dimensions only, as rotate-half in transformers does it."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.layers.rotary import rotary, rotary_tables


def test_only_the_rotary_dimensions_turn():
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 7, 4000, 8000])
    cos, sin = rotary_tables(positions, 16, 1e7)
    turned = rotary(x, cos, sin)
    twice_cos, twice_sin = (torch.cat([x, x], -1)[None] for x in (cos, sin))
    heads_first = x[..., :16].transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, twice_cos, twice_sin)
    torch.testing.assert_close(turned[..., :16], expected[0].transpose(0, 1))
    assert torch.equal(turned[..., 16:], x[..., 16:])
    assert torch.equal(turned[0], x[0])


def test_frequencies_span_the_rotary_dimensions_not_the_head():
    cos, sin = rotary_tables(torch.tensor([3]), 8, 10_000.0)
    angles = torch.tensor([3 * 10_000 ** (-2 * i / 8) for i in range(4)])
    torch.testing.assert_close(cos[0], angles.cos())
    torch.testing.assert_close(sin[0], angles.sin())
