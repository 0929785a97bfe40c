"""Masks of logits by their kernel against the plain code: bit for bit."""

import pytest
import torch

from model.engine.mask_memory import MaskMemory
from model.engine.sampling import Draw, Masks, choose
from model.layers.dispatch import plain_layers

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocabulary", [77, 4096, 200_064])
def test_masked_rows_are_those_of_the_plain_code_and_the_others_stay(vocabulary, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(9, vocabulary, generator=generator).cuda()
    words = torch.randint(
        -(2**31), 2**31, (4, -(-vocabulary // 32)), generator=generator, dtype=torch.int32
    )
    words[1] = 0  # but one token, whose bit is the sign
    words[1, 0] = -(2**31)
    words[2] = -1  # everything
    masks = MaskMemory(logits.device).upload(Masks(0, (7, 0, 3, 8), words.numpy()))
    draws = [Draw(temperature, 1.0, 0.7)] * 9
    fast, slow = logits.clone(), logits.clone()
    chosen = choose(fast, draws, masks)
    with plain_layers():
        expected = choose(slow, draws, masks)
    assert torch.equal(fast, slow)
    for column, expected_column in zip(chosen, expected, strict=True):
        assert torch.equal(column, expected_column)
    assert torch.equal(fast[[1, 2, 3, 4, 5, 6]], logits[[1, 2, 3, 4, 5, 6]])
    assert int(chosen[0][0]) == 31
    allowed = (words[0][:, None] >> torch.arange(32) & 1).bool().flatten()[:vocabulary]
    assert torch.equal(fast[7].isfinite().cpu(), allowed)
