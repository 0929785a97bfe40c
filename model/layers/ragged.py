"""The shape of one pass: which tokens of which sequences, and where their memory is.

T new tokens, S sequences, B blocks. Owns no memory and takes no decisions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Tokens in a K/V block, and the grain of chunked attention: blocks start at multiples of it,
# counted from the start of the sequence, so that cutting a prompt there changes no bit of it.
BLOCK_TOKENS = 64

# Numbers in 16 bytes. Tensors begin at multiples of it, or a Triton kernel would be compiled again
# for every combination of arguments that do not.
ALIGNED = 4


def to_device(columns: Sequence[npt.ArrayLike], device: torch.device | str) -> list[Tensor]:
    """int32 tensors of whole numbers, flat, in one transfer that the host does not wait for."""
    arrays = [np.asarray(column, dtype=np.int32).ravel() for column in columns]
    starts = np.cumsum([0, *(-(-len(array) // ALIGNED) * ALIGNED for array in arrays)])
    packed = torch.empty(
        int(starts[-1]), dtype=torch.int32, pin_memory=torch.device(device).type == "cuda"
    )
    on_host = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        on_host[start : start + len(array)] = array
    packed = packed.to(device, non_blocking=True)
    return [packed[i : i + len(array)] for i, array in zip(starts, arrays, strict=False)]


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence that lie in one block of BLOCK_TOKENS positions.

    They are rows [start, start + length) of the batch, at positions [position, position + length).
    """

    sequence: int
    start: int
    length: int
    position: int


@dataclass(frozen=True)
class RaggedBatch:
    """T new tokens of S sequences laid end to end, and where their memory is.

    lengths, contexts: (host) new tokens of each sequence, and how many of it are in memory.
    positions_T: int64. offsets_S1: int32, cumulative lengths. contexts_S: int32.
    slots_S: int64, lightning slot. blocks_SB: int32, K/V blocks in order, padded with 0.
    """

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    positions_T: Tensor
    offsets_S1: Tensor
    contexts_S: Tensor
    slots_S: Tensor
    blocks_SB: Tensor

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        contexts: Sequence[int],
        slots: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> "RaggedBatch":
        """Lay sequences end to end. Each block table covers context + length tokens or more.

        Raises ValueError when the lists do not describe the same sequences, or a table is short.
        """
        if not len(lengths) == len(contexts) == len(slots) == len(block_tables) > 0:
            raise ValueError(
                f"{len(lengths)} lengths, {len(contexts)} contexts, {len(slots)} slots and "
                f"{len(block_tables)} block tables; expected as many of each, and at least one"
            )
        for i, (length, context, table) in enumerate(
            zip(lengths, contexts, block_tables, strict=True)
        ):
            if length < 1 or len(table) * BLOCK_TOKENS < context + length:
                raise ValueError(
                    f"sequence {i}: {length} new tokens after {context} in {len(table)} blocks "
                    f"of {BLOCK_TOKENS}"
                )
        widest = max(len(table) for table in block_tables)
        padded = [[*table, *[0] * (widest - len(table))] for table in block_tables]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts_T = np.repeat(np.asarray(contexts) - offsets[:-1], lengths)
        on_device = to_device(
            [starts_T + np.arange(offsets[-1]), offsets, contexts, slots, padded], device
        )
        positions_T, offsets_S1, contexts_S, slots_S, blocks = on_device
        return cls(
            lengths=tuple(lengths),
            contexts=tuple(contexts),
            positions_T=positions_T.long(),
            offsets_S1=offsets_S1,
            contexts_S=contexts_S,
            slots_S=slots_S.long(),
            blocks_SB=blocks.view(-1, widest),
        )

    def pieces(self) -> list[Piece]:
        """The new tokens cut where their sequences cross a multiple of BLOCK_TOKENS, in order.

        How a sequence is cut depends only on positions, never on the chunk it arrived in (given
        chunks that start at multiples of BLOCK_TOKENS), so whoever computes piece by piece
        computes the same thing however the prompt was chunked.
        """
        pieces, start = [], 0
        for sequence, (length, context) in enumerate(zip(self.lengths, self.contexts, strict=True)):
            position, end = context, context + length
            while position < end:
                step = min(end, (position // BLOCK_TOKENS + 1) * BLOCK_TOKENS) - position
                pieces.append(Piece(sequence, start, step, position))
                position, start = position + step, start + step
        return pieces
