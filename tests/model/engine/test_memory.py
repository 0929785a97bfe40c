"""How bytes become slots and blocks, the same on every rank."""

import pytest

from model.engine.memory import Capacity, Memory, Room, share_out
from schemas.errors import ConfigError


def test_slots_and_blocks_fit_the_budget_of_every_rank():
    rooms = [Room(10_000, 100, 3), Room(9_000, 120, 0), Room(8_000, 0, 10)]
    capacity = share_out(rooms, max_sequences=50, tokens_per_sequence=64 * 8)
    for room in rooms:
        used = capacity.slots * room.slot_bytes + capacity.blocks * room.block_bytes
        assert used <= room.budget
    assert capacity == Capacity(slots=50, blocks=800)


def test_every_slot_comes_with_the_blocks_of_an_expected_sequence():
    capacity = share_out([Room(10_000, 100, 10)], max_sequences=256, tokens_per_sequence=640)
    assert capacity == Capacity(slots=50, blocks=500)


def test_pools_that_could_never_be_used_are_not_allocated():
    capacity = share_out([Room(2**30, 100, 10)], max_sequences=3, tokens_per_sequence=640)
    assert capacity == Capacity(slots=3, blocks=120)


def test_a_rank_without_room_for_one_sequence_says_how_much_it_takes():
    rooms = [Room(2**30, 2**20, 2**10), Room(2**20, 2**20, 2**10)]
    with pytest.raises(ConfigError, match=r"a rank has 1 MiB .* one of 65536 tokens takes 2 MiB"):
        share_out(rooms, max_sequences=4, tokens_per_sequence=65536)


def test_more_blocks_than_are_free_are_not_given():
    memory = Memory(Capacity(1, 3))
    blocks = memory.take_blocks(2)
    with pytest.raises(IndexError, match="2 blocks asked for, 1 are free"):
        memory.take_blocks(2)
    memory.give_back(memory.take_slot(), blocks)
    assert (memory.free_slots, memory.free_blocks) == (1, 3)
