"""Masks on their way to a device: none is overwritten, however they come and go."""

import numpy as np
import pytest
import torch

from model.engine.mask_memory import MaskMemory
from model.engine.sampling import Masks


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_every_mask_arrives_with_its_row_however_many_there_are(device):
    memory, rng = MaskMemory(device), np.random.default_rng(0)
    for number, count in enumerate([3, 1, 128, 0, 7, 127, 2, 128]):
        words = rng.integers(-(2**31), 2**31, (count, 13), dtype=np.int64).astype(np.int32)
        rows = tuple(rng.permutation(200)[:count].tolist())
        written = memory.take(count, 13)
        written[...] = words
        # Some come from elsewhere, as those for a rank in another process.
        bits = words.copy() if number % 3 == 1 else written
        arrived = memory.upload(Masks(number, rows, bits))
        assert arrived.rows_C.tolist() == list(rows)
        assert np.array_equal(arrived.bits_CW.cpu().numpy(), words)
        assert arrived.bits_CW.is_contiguous()


def test_masks_are_written_beside_those_that_are_still_copied(device):
    memory = MaskMemory(device)
    first = memory.take(4, 5)
    first[...] = 1
    memory.upload(Masks(0, (0, 1, 2, 3), first))
    second = memory.take(4, 5)
    second[...] = 2
    assert (first == 1).all()
    memory.upload(Masks(1, (0, 1, 2, 3), second))
    assert np.shares_memory(memory.take(2, 5), first)


def test_the_same_masks_may_be_uploaded_twice(device):
    memory = MaskMemory(device)
    bits = memory.take(2, 3)
    bits[...] = np.arange(6).reshape(2, 3)
    for rows in ((0, 1), (5, 4)):
        arrived = memory.upload(Masks(0, rows, bits))
        assert arrived.rows_C.tolist() == list(rows)
        assert arrived.bits_CW.flatten().tolist() == list(range(6))
