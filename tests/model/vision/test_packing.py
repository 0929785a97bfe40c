"""Packing against a plain walk over the grid's patches, one by one."""

import pytest
import torch

from model.inputs.tiling import Layout, choose_layout
from model.vision.packing import pack

TILE, PATCH, SIDE = 56, 14, 4
PINPOINTS = [(a * TILE, b * TILE) for a in range(1, 4) for b in range(1, 4)]


def numbered(layout: Layout) -> torch.Tensor:
    """Features that say where they are from: (tile, row, column) of each patch."""
    where = [(n, r, c) for n in range(layout.tiles) for r in range(SIDE) for c in range(SIDE)]
    return torch.tensor(where, dtype=torch.float32).view(layout.tiles, SIDE * SIDE, 3)


def expected(layout: Layout) -> list[list[int]]:
    top = (layout.rows * SIDE - layout.patch_rows) // 2
    left = (layout.columns * SIDE - layout.patch_columns) // 2
    packed = [[0, r, c] for r in range(SIDE) for c in range(SIDE)]
    for row in range(top, top + layout.patch_rows):
        for column in range(left, left + layout.patch_columns):
            tile = 1 + row // SIDE * layout.columns + column // SIDE
            packed.append([tile, row % SIDE, column % SIDE])
        packed.append([-1, -1, -1])
    return packed


@pytest.mark.parametrize(
    "size", [(112, 56), (56, 168), (168, 168), (200, 90), (90, 200), (640, 480), (3, 400), (400, 3)]
)
def test_patches_come_in_reading_order_without_padding(size):
    layout = choose_layout(size[0], size[1], PINPOINTS, TILE, PATCH)
    packed = pack(numbered(layout), torch.full((3,), -1.0), layout)
    assert packed.int().tolist() == expected(layout)
    assert len(packed) == layout.tokens


def test_tiles_of_another_layout_are_refused():
    layout = choose_layout(112, 112, PINPOINTS, TILE, PATCH)
    with pytest.raises(ValueError, match=f"4 tiles for a layout of {layout.tiles}"):
        pack(torch.zeros(4, SIDE * SIDE, 3), torch.zeros(3), layout)
