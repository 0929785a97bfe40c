"""How sequences are laid end to end and cut at blocks."""

import itertools

import pytest

from model.layers.ragged import BLOCK_TOKENS, RaggedBatch


def test_sequences_lie_end_to_end_with_their_own_positions():
    batch = RaggedBatch.build([3, 1, 2], [0, 70, 64], [5, 0, 2], [[1], [4, 9], [3, 7, 8]])
    assert batch.positions_T.tolist() == [0, 1, 2, 70, 64, 65]
    assert batch.offsets_S1.tolist() == [0, 3, 4, 6]
    assert batch.contexts_S.tolist() == [0, 70, 64]
    assert batch.slots_S.tolist() == [5, 0, 2]
    assert batch.blocks_SB.tolist() == [[1, 0, 0], [4, 9, 0], [3, 7, 8]]


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
