"""The block form against the recurrence as the paper writes it, however prompts are cut."""

import itertools

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from model.config import load_config
from model.layers.lightning_attention import lightning_attention, lightning_slopes
from model.layers.ragged import RaggedBatch
from model.layers.states import States

HEADS, DIM, SLOTS = 4, 16, 5
SLOPES = torch.tensor([0.6, 0.2, 0.03, 0.001])


def draw(tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, HEADS, DIM, generator=generator) for _ in range(3))


def naive(q, k, v, state=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, in fp64."""
    state = torch.zeros(HEADS, DIM, DIM).double() if state is None else state
    decay = torch.exp(-SLOPES.double())[:, None, None]
    outputs = []
    for q_t, k_t, v_t in zip(q.double(), k.double(), v.double(), strict=True):
        state = decay * state + k_t[:, :, None] * v_t[:, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q_t, state))
    return torch.stack(outputs), state


def run_in_chunks(qkv, cuts: list[int], pool, slot: int = 2) -> torch.Tensor:
    outputs = []
    for start, end in itertools.pairwise(cuts):
        batch = RaggedBatch.build([end - start], [start], [slot], [range(9)])
        q, k, v = (x[start:end] for x in qkv)
        outputs.append(lightning_attention(q, k, v, SLOPES, States(pool), batch))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "cuts", [[0, 200], [0, 64, 200], [0, 128, 192, 200], [0, 63, 64, 131, 200]]
)
def test_a_chunked_prompt_equals_the_recurrence(cuts):
    qkv = draw(200, seed=0)
    pool = torch.full((SLOTS, HEADS, DIM, DIM), 7.0)  # left by another sequence
    expected, state = naive(*qkv)
    torch.testing.assert_close(
        run_in_chunks(qkv, cuts, pool).double(), expected, rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(pool[2].double(), state, rtol=1e-5, atol=1e-4)
    assert (pool[[0, 1, 3, 4]] == 7).all()


@pytest.mark.parametrize("tokens", [64, 65, 129, 200])
def test_chunks_cut_at_blocks_change_no_bit(tokens):
    qkv = draw(tokens, seed=1)
    pools = [torch.zeros(SLOTS, HEADS, DIM, DIM) for _ in range(2)]
    whole = run_in_chunks(qkv, [0, tokens], pools[0])
    cut = run_in_chunks(qkv, [*range(0, tokens, 64), tokens], pools[1])
    assert torch.equal(whole, cut)
    assert torch.equal(*pools)


def test_packed_states_change_a_prompt_and_what_follows_by_far_less_than_bf16_does():
    q, k, v = draw(280, seed=4)
    states = States.empty(SLOTS, HEADS, DIM, "cpu", packed=True)
    cuts = [0, 64, 200, *range(201, 281)]
    outputs = []
    for start, end in itertools.pairwise(cuts):
        batch = RaggedBatch.build([end - start], [start], [2], [range(9)])
        rows = slice(start, end)
        outputs.append(lightning_attention(q[rows], k[rows], v[rows], SLOPES, states, batch))
    expected, _ = naive(q, k, v)
    assert (torch.cat(outputs) - expected).norm() < 3e-4 * expected.norm()


def test_sequences_of_a_batch_do_not_touch_each_other():
    lengths, contexts, slots = [70, 1, 130, 1], [64, 7, 0, 80], [3, 0, 4, 1]
    pool = torch.randn(SLOTS, HEADS, DIM, DIM, generator=torch.Generator().manual_seed(2))
    q, k, v = draw(sum(lengths), seed=3)
    batch = RaggedBatch.build(lengths, contexts, slots, [range(3)] * 4)
    together = pool.clone()
    o = lightning_attention(q, k, v, SLOPES, States(together), batch)
    start = 0
    for length, context, slot in zip(lengths, contexts, slots, strict=True):
        rows = slice(start, start + length)
        alone = pool.clone()
        single = RaggedBatch.build([length], [context], [slot], [range(3)])
        expected = lightning_attention(q[rows], k[rows], v[rows], SLOPES, States(alone), single)
        assert torch.equal(o[rows], expected)
        assert torch.equal(together[slot], alone[slot])
        initial = pool[slot].double() if context else None
        reference, _ = naive(q[rows], k[rows], v[rows], initial)
        torch.testing.assert_close(expected.double(), reference, rtol=1e-5, atol=1e-4)
        start += length


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_slopes_are_those_of_the_global_layer(checkpoint, layer):
    text = load_config(checkpoint).text
    theirs = MiniMaxLightningAttention(
        MiniMaxConfig(
            hidden_size=64,
            num_attention_heads=text.num_heads,
            head_dim=text.head_dim,
            num_hidden_layers=text.num_layers,
            layer_types=["linear_attention"] * text.num_layers,
        ),
        layer,
    ).get_slope_rate()
    torch.testing.assert_close(lightning_slopes(layer, text), theirs.flatten(), rtol=1e-4, atol=0)
