"""How sequences are laid end to end and cut at blocks."""

import itertools

import pytest
import torch

from model.layers.ragged import (
    BLOCK_TOKENS,
    BatchOnHost,
    RaggedBatch,
    device_numbers,
    to_device,
)


def test_sequences_lie_end_to_end_with_their_own_positions():
    batch = RaggedBatch.build([3, 1, 2], [0, 70, 64], [5, 0, 2], [[1], [4, 9], [3, 7, 8]])
    assert batch.positions_T.tolist() == [0, 1, 2, 70, 64, 65]
    assert batch.offsets_S1.tolist() == [0, 3, 4, 6]
    assert batch.contexts_S.tolist() == [0, 70, 64]
    assert batch.slots_S.tolist() == [5, 0, 2]
    assert batch.blocks_SB[:, :3].tolist() == [[1, 0, 0], [4, 9, 0], [3, 7, 8]]
    assert not batch.blocks_SB[:, 3:].any()


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128)])
def test_tables_have_few_widths(longest, width):
    batch = RaggedBatch.build([1, 1], [0, 64 * longest - 1], [0, 1], [[7], range(longest)])
    assert batch.blocks_SB.shape == (2, width)
    assert batch.blocks_SB[1, :longest].tolist() == list(range(longest))


def test_a_batch_written_over_another_of_its_shape_is_that_batch():
    first, second = (
        BatchOnHost.build([1] * 3, contexts, slots, [[1], [4, 9], [3, 7, 8]])
        for contexts, slots in (([0, 70, 129], [5, 0, 2]), ([9, 100, 191], [1, 3, 4]))
    )
    packed = torch.full((device_numbers(first.columns),), -1, dtype=torch.int32)
    columns = to_device(first.columns, "cpu", into=packed)
    assert [column.tolist() for column in columns] == [c.ravel().tolist() for c in first.columns]
    to_device(second.columns, "cpu", into=packed)
    batch, expected = (
        RaggedBatch.of_columns(second.lengths, second.contexts, columns),
        second.to("cpu"),
    )
    for field in ("positions_T", "offsets_S1", "contexts_S", "slots_S", "blocks_SB"):
        assert torch.equal(getattr(batch, field), getattr(expected, field)), field


@pytest.mark.parametrize("cuts", [[0, 200], [0, 64, 200], [0, 128, 192, 200]])
def test_pieces_do_not_depend_on_where_a_prompt_was_cut(cuts):
    seen = []
    for start, end in itertools.pairwise(cuts):
        batch = RaggedBatch.build([end - start], [start], [0], [range(4)])
        seen += [(p.position, p.length) for p in batch.pieces()]
    assert seen == [(0, 64), (64, 64), (128, 64), (192, 8)]


def test_pieces_cover_every_row_once():
    batch = RaggedBatch.build([130, 1, 65], [64, 63, 0], [0, 1, 2], [range(4)] * 3)
    rows = [row for p in batch.pieces() for row in range(p.start, p.start + p.length)]
    assert rows == list(range(196))
    for p in batch.pieces():
        assert p.position // BLOCK_TOKENS == (p.position + p.length - 1) // BLOCK_TOKENS


@pytest.mark.parametrize(
    "arguments",
    [
        ([1, 2], [0], [0, 1], [[0], [1]]),
        ([], [], [], []),
        ([65], [0], [0], [[0]]),
        ([0], [0], [0], [[0]]),
    ],
)
def test_a_batch_that_does_not_fit_its_memory_is_refused(arguments):
    with pytest.raises(ValueError, match="block"):
        RaggedBatch.build(*arguments)
