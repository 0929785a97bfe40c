"""Tokens grouped by expert against a loop over tokens."""

import pytest
import torch
from torch.nn import functional

from model.config import Residual
from model.layers.moe import experts, route
from model.weights.quantization import quantize

EXPERTS, HIDDEN, INNER = 6, 32, 48


def weights(quantized: bool):
    """w13, its scale, w2, its scale, and the plain weights that they stand for."""
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / 6
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / 7
    if not quantized:
        return (w13, None, w2, None), (w13, w2)
    data13, scale13 = (torch.stack(x) for x in zip(*map(quantize, w13), strict=True))
    data2, scale2 = (torch.stack(x) for x in zip(*map(quantize, w2), strict=True))
    return (data13, scale13, data2, scale2), (scale13.float() * data13, scale2.float() * data2)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_grouped_experts_equal_a_loop_over_tokens(tokens, quantized):
    stored, (w13, w2) = weights(quantized)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    chosen, shares = route(torch.randn(tokens, EXPERTS, generator=generator), 2)
    expected = torch.zeros_like(x)
    for t in range(tokens):
        for expert, share in zip(chosen[t], shares[t], strict=True):
            gate, up = w13[expert, :INNER] @ x[t], w13[expert, INNER:] @ x[t]
            expected[t] += share * (w2[expert] @ (functional.silu(gate) * up))
    torch.testing.assert_close(experts(x, chosen, shares, *stored), expected, rtol=1e-5, atol=1e-5)


def test_what_experts_make_of_tokens_is_added_to_them():
    stored, _ = weights(quantized=True)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(20, HIDDEN, generator=generator)
    chosen, shares = route(torch.randn(20, EXPERTS, generator=generator), 2)
    expected = 3.5 * x + 0.5 * experts(x, chosen, shares, *stored)
    added = experts(x, chosen, shares, *stored, residual=Residual(3.5, 0.5))
    assert torch.equal(added, expected)


def test_a_token_does_not_change_with_the_tokens_around_it():
    stored, _ = weights(quantized=True)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(90, HIDDEN, generator=generator)
    chosen, shares = route(torch.randn(90, EXPERTS, generator=generator), 3)
    whole = experts(x, chosen, shares, *stored)
    for part in (slice(0, 1), slice(3, 20), slice(40, 90)):
        assert torch.equal(experts(x[part], chosen[part], shares[part], *stored), whole[part])


def test_int8_inputs_change_little_and_no_token_its_neighbours():
    stored, _ = weights(quantized=True)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, HIDDEN, generator=generator)
    chosen, shares = route(torch.randn(60, EXPERTS, generator=generator), 2)
    exact = experts(x, chosen, shares, *stored)
    whole = experts(x, chosen, shares, *stored, quantize_x=True)
    assert 0 < (whole - exact).norm() / exact.norm() < 0.03
    part = experts(x[5:9], chosen[5:9], shares[5:9], *stored, quantize_x=True)
    assert torch.equal(part, whole[5:9])


def test_routing_is_a_softmax_over_all_then_the_top_renormalised():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    chosen, shares = route(logits, 2)
    assert chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(shares, torch.softmax(torch.tensor([[3.0, 2.0]]), -1))
