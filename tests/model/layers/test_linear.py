"""Rows must not depend on the batch they are computed in, and int8 must be quanto's product."""

import pytest
import torch
from optimum.quanto import qint8  # noqa: F401  (registers torch.ops.quanto)
from torch.nn import functional

from model.layers.linear import linear, quantize_rows
from model.weights.quantization import quantize


def test_the_int8_product_is_not_another_than_quantos():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 96, generator=generator)
    data, scale = quantize(torch.randn(80, 96, generator=generator))
    expected = torch.ops.quanto.qbytes_mm(x, data, scale.float())
    assert torch.equal(linear(x, data, scale), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 384), (64, 8), (256, 128), (96, 1000)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_change_with_the_rows_around_it(inputs, outputs, threads):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one_by_one = torch.cat([linear(row[None], weight) for row in x])
        torch.set_num_threads(threads)
        for start, end in [(0, 300), (0, 2), (7, 16), (5, 52), (100, 299)]:
            assert torch.equal(linear(x[start:end], weight), one_by_one[start:end])
    finally:
        torch.set_num_threads(before)


def test_padding_leaves_no_trace_in_shape_or_value():
    x, weight = torch.randn(5, 32), torch.randn(12, 32)
    y = linear(x, weight)
    assert y.shape == (5, 12)
    torch.testing.assert_close(y, functional.linear(x, weight))


def test_a_product_of_int8_inputs_is_the_whole_numbers_times_both_scales():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 96, generator=generator) * torch.logspace(-3, 3, 20)[:, None]
    weight, scale = quantize(torch.randn(80, 96, generator=generator))
    levels, steps = quantize_rows(x)
    assert torch.equal(levels.abs().amax(dim=1), torch.full((20,), 127, dtype=torch.int8))
    sums = levels.long() @ weight.long().T
    expected = sums.float() * steps * scale.float().T
    found = linear(x, weight, scale, quantize_x=True)
    assert torch.equal(found, expected)
    exact = linear(x, weight, scale)
    error = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 0.02


def test_a_row_of_zeros_is_no_division_by_zero():
    levels, steps = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -0.5]]))
    assert levels.tolist() == [[0, 0], [127, -64]]
    assert steps[0] == 0
