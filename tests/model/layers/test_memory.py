"""A sequence put aside and brought back elsewhere must be the same sequence."""

import torch

from model.config import load_config
from model.layers.memory import LayerMemory, block_bytes, slot_bytes


def filled_memory(checkpoint) -> LayerMemory:
    text = load_config(checkpoint).text
    memory = LayerMemory(text, range(5, 8), slots=3, blocks=6, dtype=torch.bfloat16, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for pools in (memory.states, memory.recent, memory.keys, memory.values):
        for pool in pools.values():
            pool.copy_(torch.randn(pool.shape, generator=generator))
    return memory


def test_save_and_restore_move_a_sequence_bit_for_bit(checkpoint):
    memory = filled_memory(checkpoint)
    saved = memory.save(1, [4, 0])
    before = {i: pool.clone() for i, pool in memory.keys.items()}
    of_slot = [
        {i: pool.clone() for i, pool in pools.items()} for pools in (memory.states, memory.recent)
    ]
    # Others overwrite its place.
    for pools in (memory.states, memory.recent, memory.keys, memory.values):
        for pool in pools.values():
            pool[:2] = -1
    memory.restore(2, [3, 5], saved)
    for i, pool in memory.keys.items():
        assert torch.equal(pool[[3, 5]], before[i][[4, 0]])
    for pools, kept in zip((memory.states, memory.recent), of_slot, strict=True):
        for i, pool in pools.items():
            assert torch.equal(pool[2], kept[i][1])


def test_the_bytes_announced_are_the_bytes_allocated(checkpoint):
    memory, text = filled_memory(checkpoint), load_config(checkpoint).text
    slots = sum(p.nbytes for pools in (memory.states, memory.recent) for p in pools.values())
    blocks = sum(p.nbytes for pools in (memory.keys, memory.values) for p in pools.values())
    assert list(memory.states) == [5, 6]
    assert list(memory.keys) == [7]
    assert slots == 3 * slot_bytes(text, range(5, 8), torch.bfloat16)
    assert blocks == 6 * block_bytes(text, range(5, 8), torch.bfloat16)
