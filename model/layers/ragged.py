"""The shape of one pass: which tokens of which sequences, and where their memory is.

T new tokens, S sequences, B blocks. Owns no memory and takes no decisions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Tokens in a K/V block, and the grain of chunked attention: blocks start at multiples of it,
# counted from the start of the sequence, so that cutting a prompt there changes no bit of it.
BLOCK_TOKENS = 64

# Numbers in 16 bytes. Tensors begin at multiples of it, or a Triton kernel would be compiled again
# for every combination of arguments that do not.
_ALIGNED = 4

# Block tables are padded to a power of two, at least this: kernels choose their launches by the
# width of the table, so that launches recorded for a few widths serve contexts of all lengths.
_LEAST_TABLE = 8


def to_device(
    columns: Sequence[npt.ArrayLike], device: torch.device | str, into: Tensor | None = None
) -> list[Tensor]:
    """int32 tensors of whole numbers, flat, in one transfer that the host does not wait for.

    into: int32 on that device, of which they become views, instead of new memory; see
    `device_numbers` for its size.
    """
    arrays = [np.asarray(column, dtype=np.int32).ravel() for column in columns]
    starts = np.cumsum([0, *(aligned(len(array)) for array in arrays)])
    packed = torch.empty(
        int(starts[-1]), dtype=torch.int32, pin_memory=torch.device(device).type == "cuda"
    )
    on_host = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        on_host[start : start + len(array)] = array
    if into is None:
        packed = packed.to(device, non_blocking=True)
    else:
        packed = into.copy_(packed, non_blocking=True)
    return [packed[i : i + len(array)] for i, array in zip(starts, arrays, strict=False)]


def device_numbers(columns: Sequence[np.ndarray]) -> int:
    """How many int32 `to_device` writes for these."""
    return sum(aligned(column.size) for column in columns)


def aligned(numbers: int) -> int:
    """The place of the first number after so many where a tensor may begin."""
    return -(-numbers // _ALIGNED) * _ALIGNED


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
    slots_S: int64, lightning slot. blocks_SB: int32, K/V blocks in order, padded with 0; B is a
    power of two.
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
        """`BatchOnHost.build`, taken to the device."""
        return BatchOnHost.build(lengths, contexts, slots, block_tables).to(device)

    @classmethod
    def of_columns(
        cls, lengths: tuple[int, ...], contexts: tuple[int, ...], columns: Sequence[Tensor]
    ) -> "RaggedBatch":
        """columns: those of a BatchOnHost, on the device."""
        positions_T, offsets_S1, contexts_S, slots_S, blocks = columns
        return cls(
            lengths=lengths,
            contexts=contexts,
            positions_T=positions_T.long(),
            offsets_S1=offsets_S1,
            contexts_S=contexts_S,
            slots_S=slots_S.long(),
            blocks_SB=blocks.view(len(lengths), -1),
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


@dataclass(frozen=True)
class BatchOnHost:
    """What becomes a RaggedBatch once its columns are on a device.

    columns: positions [T], offsets [S + 1], contexts [S], slots [S] and block tables [S, B].
    """

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    columns: tuple[np.ndarray, ...]

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        contexts: Sequence[int],
        slots: Sequence[int],
        block_tables: Sequence[Sequence[int]],
    ) -> "BatchOnHost":
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
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        starts_T = np.repeat(np.asarray(contexts) - offsets[:-1], lengths)
        positions_T = starts_T + np.arange(offsets[-1])
        columns = (positions_T, offsets, contexts, slots, _padded(block_tables))
        return cls(
            lengths=tuple(lengths),
            contexts=tuple(contexts),
            columns=tuple(np.asarray(column, dtype=np.int32) for column in columns),
        )

    @property
    def tokens(self) -> int:
        return len(self.columns[0])

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def table(self) -> int:
        """The width of the block tables."""
        return self.columns[-1].shape[1]

    def to(self, device: torch.device | str) -> RaggedBatch:
        columns = to_device(self.columns, device)
        return RaggedBatch.of_columns(self.lengths, self.contexts, columns)


def _padded(block_tables: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [S, B], 0 after the end of each table."""
    lengths_S = np.array([len(table) for table in block_tables])
    width = max(_LEAST_TABLE, 1 << int(lengths_S.max() - 1).bit_length())
    padded_SB = np.zeros((len(block_tables), width), dtype=np.int32)
    inside_SB = np.arange(width) < lengths_S[:, None]
    padded_SB[inside_SB] = np.fromiter(chain.from_iterable(block_tables), np.int32)
    return padded_SB
