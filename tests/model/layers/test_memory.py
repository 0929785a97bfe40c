"""A sequence put aside and brought back elsewhere must be the same sequence."""

import pytest
import torch

from model.config import load_config
from model.layers.memory import LayerMemory, block_bytes, slot_bytes


@pytest.fixture(params=["plain", "packed"])
def memory(request, checkpoint, monkeypatch) -> LayerMemory:
    """Filled, with states as on a CPU or as for the kernels."""
    monkeypatch.setattr("model.layers.memory.packs_states", lambda *_: request.param == "packed")
    text = load_config(checkpoint).text
    memory = LayerMemory(text, range(5, 8), slots=3, blocks=6, dtype=torch.bfloat16, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for pool in [*of_slots(memory), *of_blocks(memory)]:
        pool.copy_(100 * torch.randn(pool.shape, generator=generator))
    return memory


def of_slots(memory: LayerMemory) -> list[torch.Tensor]:
    packed = [pool for states in memory.states.values() for pool in states.tensors]
    return [*packed, *memory.recent.values()]


def of_blocks(memory: LayerMemory) -> list[torch.Tensor]:
    return [*memory.keys.values(), *memory.values.values()]


def test_save_and_restore_move_a_sequence_bit_for_bit(memory):
    saved = memory.save(1, [4, 0])
    kept = [pool.clone() for pool in of_slots(memory)]
    before = [pool.clone() for pool in of_blocks(memory)]
    # Others overwrite its place.
    for pool in [*of_slots(memory), *of_blocks(memory)]:
        pool[:2] = -1
    memory.restore(2, [3, 5], saved)
    for pool, then in zip(of_blocks(memory), before, strict=True):
        assert torch.equal(pool[[3, 5]], then[[4, 0]])
    for pool, then in zip(of_slots(memory), kept, strict=True):
        assert torch.equal(pool[2], then[1])


def test_the_bytes_announced_are_the_bytes_allocated(memory, checkpoint):
    text = load_config(checkpoint).text
    packed = memory.states[5].scale_SHCK is not None
    assert list(memory.states) == [5, 6]
    assert list(memory.keys) == [7]
    slots = sum(pool.nbytes for pool in of_slots(memory))
    assert slots == 3 * slot_bytes(text, range(5, 8), torch.bfloat16, packed=packed)
    blocks = sum(pool.nbytes for pool in of_blocks(memory))
    assert blocks == 6 * block_bytes(text, range(5, 8), torch.bfloat16)
