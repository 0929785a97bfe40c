"""Attention over scattered blocks against torch's own over contiguous keys and values."""

import itertools

import pytest
import torch
from torch.nn import functional

from model.layers.ragged import BLOCK_TOKENS, RaggedBatch
from model.layers.softmax_attention import paged_attention

HEADS, GROUPS, DIM, BLOCKS = 6, 2, 16, 16


def draw(tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, n, DIM, generator=generator) for n in (HEADS, GROUPS, GROUPS))


def pools() -> list[torch.Tensor]:
    """What other sequences left behind: no number that may be looked at."""
    return [torch.full((BLOCKS, BLOCK_TOKENS, GROUPS, DIM), float("nan")) for _ in range(2)]


def contiguous(q, k, v) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o[0].transpose(0, 1)


def run_in_chunks(qkv, cuts, table, keys, values) -> torch.Tensor:
    outputs = []
    for start, end in itertools.pairwise(cuts):
        batch = RaggedBatch.build([end - start], [start], [0], [table])
        q, k, v = (x[start:end] for x in qkv)
        outputs.append(paged_attention(q, k, v, keys, values, batch))
    return torch.cat(outputs)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_scattered_blocks_attend_like_contiguous_ones(tokens):
    qkv = draw(tokens, seed=0)
    o = run_in_chunks(qkv, [0, tokens], [7, 2, 11, 0], *pools())
    torch.testing.assert_close(o, contiguous(*qkv), rtol=1e-5, atol=1e-5)


def test_decode_after_a_prompt_attends_to_all_of_it():
    qkv = draw(140, seed=1)
    cuts = [0, 64, 125, *range(126, 141)]  # over the border of a block
    o = run_in_chunks(qkv, cuts, [3, 9, 4], *pools())
    torch.testing.assert_close(o, contiguous(*qkv), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [65, 129, 200])
def test_chunks_cut_at_blocks_change_no_bit(tokens):
    qkv = draw(tokens, seed=2)
    whole = run_in_chunks(qkv, [0, tokens], [0, 1, 2, 3], *pools())
    cut = run_in_chunks(qkv, [*range(0, tokens, 64), tokens], [9, 8, 5, 6], *pools())
    assert torch.equal(whole, cut)


def test_sequences_of_a_batch_do_not_see_each_other():
    first, second = draw(100, seed=3), draw(70, seed=4)
    keys, values = pools()
    run_in_chunks([x[:64] for x in second], [0, 64], [4, 5], keys, values)
    batch = RaggedBatch.build([100, 6], [0, 64], [0, 1], [[1, 2], [4, 5]])
    q, k, v = (torch.cat([a, b[64:]]) for a, b in zip(first, second, strict=True))
    o = paged_attention(q, k, v, keys, values, batch)
    torch.testing.assert_close(o[:100], contiguous(*first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o[100:], contiguous(*second)[64:], rtol=1e-5, atol=1e-5)
