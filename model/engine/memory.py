"""The one owner of memory ids: which lightning slots and K/V blocks are free. No tensors here.

Both pools come out of one byte budget and have the same counts on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.engine.sequence import blocks_for
from schemas.errors import ConfigError


@dataclass(frozen=True)
class Room:
    """What one rank can give: bytes for slots and blocks, and the bytes of one of each there.

    slot_bytes or block_bytes is 0 on a rank without lightning or without softmax layers.
    """

    budget: int
    slot_bytes: int
    block_bytes: int


@dataclass(frozen=True)
class Capacity:
    """Sequences (slots) and K/V blocks that fit in memory at once, on every rank."""

    slots: int
    blocks: int


def share_out(rooms: Sequence[Room], max_sequences: int, tokens_per_sequence: int) -> Capacity:
    """Divide the ranks' budgets into slots and blocks, the same numbers for all.

    Slots come first, each with the blocks of a sequence of the expected length; blocks then take
    what is left, up to four times that length (pools beyond it would lie idle).
    Raises ConfigError when not even one sequence of the expected length fits.
    """
    wanted = blocks_for(tokens_per_sequence)
    slots = max_sequences
    for room in rooms:
        sequence_bytes = room.slot_bytes + wanted * room.block_bytes
        if room.budget < sequence_bytes:
            raise ConfigError(
                f"a rank has {room.budget / 2**20:,.0f} MiB for sequences, and one of "
                f"{tokens_per_sequence} tokens takes {sequence_bytes / 2**20:,.0f} MiB: "
                "use more ranks, a smaller chunk_tokens or tokens_per_sequence, "
                "or a larger cache_bytes"
            )
        slots = min(slots, room.budget // max(1, sequence_bytes))
    blocks = 4 * wanted * slots
    for room in rooms:
        left = room.budget - slots * room.slot_bytes
        blocks = min(blocks, left // room.block_bytes) if room.block_bytes else blocks
    return Capacity(slots, blocks)


class Memory:
    """Gives out slot and block ids and takes them back. An id has one owner at a time."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        # Popped from the end: the lowest ids first.
        self._slots = list(reversed(range(capacity.slots)))
        self._blocks = list(reversed(range(capacity.blocks)))

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    @property
    def free_blocks(self) -> int:
        return len(self._blocks)

    def take_slot(self) -> int:
        return self._slots.pop()

    def take_blocks(self, count: int) -> list[int]:
        if count > len(self._blocks):
            raise IndexError(f"{count} blocks asked for, {len(self._blocks)} are free")
        return [self._blocks.pop() for _ in range(count)]

    def give_back(self, slot: int, blocks: Sequence[int]) -> None:
        self._slots.append(slot)
        self._blocks.extend(reversed(blocks))
