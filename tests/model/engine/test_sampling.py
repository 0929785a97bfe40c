"""Choosing tokens, against a slow twin in Python floats and against the distribution itself."""

import math

import numpy as np
import pytest
import torch

from model.engine.mask_memory import MaskMemory
from model.engine.sampling import Draw, Masks, choose, uniform
from schemas.requests import Sampling


def _choose_slowly(logits: list[float], draw: Draw) -> int:
    if draw.temperature == 0:
        return max(range(len(logits)), key=lambda token: logits[token])
    highest = max(logits)
    weights = [math.exp((logit - highest) / draw.temperature) for logit in logits]
    whole = sum(weights)
    probs = [(weight / whole, token) for token, weight in enumerate(weights) if weight]
    if draw.top_p < 1:  # else in the order of the vocabulary
        probs.sort(key=lambda pair: -pair[0])
    nucleus, mass = [], 0.0
    for prob, token in probs:
        nucleus.append((prob, token))
        mass += prob
        if draw.top_p < 1 and mass >= draw.top_p:
            break
    left = draw.uniform * mass
    for prob, token in nucleus:
        left -= prob
        if left < 0:
            return token
    return nucleus[-1][1]


def test_tokens_are_those_of_the_slow_twin():
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    logits = torch.randn(400, 50, generator=generator) * 3
    draws = [
        Draw(rng.choice([0.0, 0.3, 1.0, 2.5]), rng.choice([0.05, 0.5, 0.9, 1.0]), rng.random())
        for _ in range(400)
    ]
    tokens, logprobs = (column.tolist() for column in choose(logits, draws))
    slow = [_choose_slowly(row, draw) for row, draw in zip(logits.tolist(), draws, strict=True)]
    assert tokens == slow
    exact = torch.log_softmax(logits.double(), -1)[range(400), tokens]
    torch.testing.assert_close(torch.tensor(logprobs).double(), exact, rtol=0, atol=1e-5)


def test_masked_tokens_are_those_of_the_slow_twin_and_other_rows_do_not_notice():
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    logits = torch.randn(300, 77, generator=generator) * 3
    draws = [
        Draw(rng.choice([0.0, 0.3, 1.0, 2.5]), rng.choice([0.05, 0.5, 0.9, 1.0]), rng.random())
        for _ in range(300)
    ]
    allowed = rng.random((300, 77)) < rng.choice([0.03, 0.5], (300, 1))
    allowed[range(300), rng.integers(0, 77, 300)] = True
    rows = tuple(range(1, 300, 2))
    # Packed bit by bit; what lies beyond the vocabulary means nothing.
    bits = np.zeros((len(rows), 3), dtype=np.uint32)
    for at, row in enumerate(rows):
        for token in range(96):
            if token >= 77 or allowed[row, token]:
                bits[at, token // 32] |= np.uint32(1 << token % 32)
    masks = Masks(0, rows, bits.view(np.int32))
    masks = MaskMemory(logits.device).upload(masks)
    tokens, logprobs = choose(logits.clone(), draws, masks)
    for row in rows:
        chosen = _choose_slowly(
            [
                x if a else -math.inf
                for x, a in zip(logits[row].tolist(), allowed[row], strict=True)
            ],
            draws[row],
        )
        assert (row, int(tokens[row])) == (row, chosen)
    free_tokens, free_logprobs = choose(logits, draws)
    assert torch.equal(tokens[::2], free_tokens[::2])
    assert torch.equal(logprobs[::2], free_logprobs[::2])
    # How sure the model was, not what the mask left of its choice.
    exact = torch.log_softmax(logits, -1)[range(300), tokens]
    assert torch.equal(logprobs, exact)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.0, 0.5)])
def test_draws_follow_the_distribution(temperature, top_p):
    count = 20_000
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -4.0])
    draws = [Draw(temperature, top_p, uniform(7, position)) for position in range(count)]
    tokens, _ = choose(logits.repeat(count, 1), draws)
    probs = torch.softmax(logits / temperature, -1).double()
    outside = probs.cumsum(-1) - probs >= top_p
    probs = probs.masked_fill(outside, 0) / probs.masked_fill(outside, 0).sum()
    seen = torch.bincount(tokens, minlength=6)
    assert not seen[outside].any()
    deviation = (seen - count * probs).abs() / (count * probs * (1 - probs)).sqrt().clamp(min=1)
    assert deviation.max() < 4


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_tokens_come_as_often_as_they_are_likely(top_p):
    """Over a vocabulary of some size, with tokens that a mask rules out between the others."""
    count, rng = 40_000, np.random.default_rng(11)
    logits = torch.from_numpy(rng.normal(0, 1.5, 60)).float()
    logits[rng.permutation(60)[:20]] = -math.inf
    draws = [Draw(0.8, top_p, uniform(5, position)) for position in range(count)]
    tokens, _ = choose(logits.repeat(count, 1), draws)
    probs = torch.softmax(logits.double() / 0.8, -1)
    ranked, order = probs.sort(descending=True)
    probs[order[ranked.cumsum(-1) - ranked >= top_p]] = 0
    probs /= probs.sum()
    seen = torch.bincount(tokens, minlength=60).double()
    assert not seen[probs == 0].any()
    expected = (count * probs)[probs > 0]
    chi_squared = ((seen[probs > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_rounding_that_rises_at_an_impossible_token_does_not_draw_it(monkeypatch):
    """As sums may that are computed in parallel."""
    cumsum = torch.Tensor.cumsum

    def rounded_up(self: torch.Tensor, dim: int) -> torch.Tensor:
        sums = cumsum(self, dim=dim)
        return torch.where(self > 0, sums, sums * (1 + 1e-5))

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded_up)
    logits = torch.zeros(1, 101)
    logits[:, 1::2] = -math.inf
    for token in range(0, 101, 2):
        # Between the sum before an impossible token and the one rounded up at it.
        u = (token / 2 + 1) / 51 * (1 + 5e-6)
        chosen, _ = choose(logits, [Draw(1.0, 1.0, min(u, 1 - 2**-53))])
        assert int(chosen) == min(token + 2, 100)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_row_alone_is_drawn_as_beside_others_though_cuda_sums_one_row_in_any_order(
    top_p, monkeypatch
):
    cumsum = torch.Tensor.cumsum

    def unlike_each_time(self: torch.Tensor, dim: int) -> torch.Tensor:
        sums = cumsum(self, dim=dim)
        return sums * sums if self.numel() == self.shape[dim] else sums

    monkeypatch.setattr(torch.Tensor, "cumsum", unlike_each_time)
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(4))
    draws = [Draw(1.0, top_p, uniform(row, 2)) for row in range(40)]
    together, _ = choose(logits, draws)
    alone = [choose(logits[row : row + 1], draws[row : row + 1])[0] for row in range(40)]
    assert torch.equal(together, torch.cat(alone))


def test_a_rows_token_does_not_depend_on_the_rows_beside_it():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(33, 20_011, generator=generator) * 2
    draws = [Draw(row % 3 * 0.5, 0.9 + row % 2 * 0.1, uniform(row, 5)) for row in range(33)]
    together = choose(logits, draws)
    alone = [choose(logits[row : row + 1], [draws[row]]) for row in range(33)]
    assert torch.equal(together[0], torch.cat([tokens for tokens, _ in alone]))
    assert torch.equal(together[1], torch.cat([logprobs for _, logprobs in alone]))


def test_impossible_tokens_are_never_drawn_and_uniforms_at_the_ends_are_safe():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for u in (0.0, 0.25, 0.5, 1 - 2**-53):
        for top_p in (1e-9, 0.5, 1.0):
            token, logprob = choose(logits, [Draw(1.0, top_p, u)])
            assert token.item() in (1, 2)
            assert logprob.item() == pytest.approx(math.log(0.5))


def test_rounding_at_the_end_of_the_distribution_draws_no_impossible_token():
    """The fp32 sum over all tokens may fall short of 1, and a uniform near 1 round to it."""
    logits = torch.randn(200, 640, generator=torch.Generator().manual_seed(2)) * 2
    logits[:, 637] = -math.inf
    draws = [Draw(1.0, 1.0, 1 - 2**-53)] * len(logits)
    tokens, logprobs = choose(logits, draws)
    assert not (tokens == 637).any()
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-60])
def test_a_temperature_of_next_to_nothing_is_greedy(temperature):
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(3)) * 20
    draws = [Draw(temperature, 1.0, uniform(row, 1)) for row in range(50)]
    assert torch.equal(choose(logits, draws)[0], logits.argmax(-1))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300, math.inf])
def test_a_temperature_beyond_fp32_draws_blindly_and_never_an_impossible_token(temperature, top_p):
    logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(6)) * 20
    logits[:, ::2] = -math.inf
    draws = [Draw(temperature, top_p, (row + 0.5) / 200) for row in range(200)]
    tokens, logprobs = choose(logits, draws)
    assert (tokens % 2 == 1).all()
    assert len(tokens.unique()) == 20 * top_p  # all are as likely
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("temperature", [-0.1, -math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused_and_not_taken_for_greedy(temperature):
    with pytest.raises(ValueError, match=r"expected 0 \(greedy\) or more"):
        Sampling(temperature=temperature)


def test_uniforms_depend_on_seed_and_position_alone_and_look_uniform():
    # Values of SplitMix64 do not change between versions, so neither does anyone's text.
    assert uniform(0, 1) == 0.8833108082136426
    numbers = np.array([[uniform(seed, position) for position in range(200)] for seed in range(50)])
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 44  # chi-squared, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.04
    assert uniform(2**70 + 3, 4) == uniform(3, 4)
    assert 0 <= uniform(-5, 10**6) < 1
