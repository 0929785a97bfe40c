"""int8 weights bit-equal to optimum-quanto's, data and scale."""

from typing import Any

import pytest
import torch
from optimum.quanto import AbsmaxOptimizer, qint8
from optimum.quanto.tensor.weights import WeightQBytesTensor

from model.weights import quantization
from model.weights.quantization import quantize


@pytest.mark.parametrize("elements", [100, 7000, 1 << 17], ids=lambda n: f"{n} at a time")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_data_and_scale_are_quantos(dtype, elements, monkeypatch):
    monkeypatch.setattr(quantization, "_CPU_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(300, 200, generator=generator) * 0.05).to(dtype)
    weight[7] *= 1000
    fp32 = weight.float()
    theirs_scale: Any = AbsmaxOptimizer().optimize(fp32, qint8, axis=0)
    scale = theirs_scale.to(torch.bfloat16)
    theirs: Any = WeightQBytesTensor.quantize(fp32, qint8, 0, scale.float(), optimized=False)
    data, ours = quantize(weight)
    assert torch.equal(ours, scale)
    assert torch.equal(data, theirs._data)
    assert data.dtype == torch.int8
    assert ours.dtype == torch.bfloat16


def test_the_error_is_that_of_eight_bits():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    data, scale = quantize(weight)
    error = (scale.float() * data - weight).norm() / weight.norm()
    assert 0.005 < error < 0.01


def test_a_row_of_zeros_stays_zero():
    weight = torch.randn(4, 8)
    weight[2] = 0
    data, scale = quantize(weight)
    assert (data[2] == 0).all()
    assert scale[2] == 0
