"""The last elements of a tensor must get the same bits as those in the middle of a larger one."""

import pytest
import torch
from torch.nn import functional

from model.layers.activation import gelu, sigmoid, silu


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [(sigmoid, torch.sigmoid), (silu, functional.silu), (gelu, functional.gelu)],
)
def test_an_element_does_not_change_with_its_place(ours, torchs):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 4
    whole = ours(x)
    torch.testing.assert_close(whole, torchs(x))
    for start in range(40):
        for length in (1, 3, 15, 17, 33, 100):
            part = slice(start, start + length)
            assert torch.equal(ours(x[part].clone()), whole[part])


@pytest.mark.parametrize("function", [sigmoid, silu, gelu])
def test_far_values_are_no_nan(function):
    y = function(torch.tensor([-1e4, -100.0, 100.0, 1e4]))
    assert y.isfinite().all()
