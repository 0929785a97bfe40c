"""The order in which the language model sees an image: thumbnail, then rows with a newline each.

N tiles, P patches of a tile, D hidden size. Owns no weights.
"""

import torch
from torch import Tensor

from model.inputs.tiling import Layout


def pack(features_NPD: Tensor, newline_D: Tensor, layout: Layout) -> Tensor:
    """Features of an image's tiles to the sequence of its image tokens, [layout.tokens, D].

    The thumbnail's patches come first; then the patches of the whole grid row by row, without
    the padding, `newline_D` after every row.
    Raises ValueError when the number of tiles is not the layout's.
    """
    if len(features_NPD) != layout.tiles:
        raise ValueError(f"{len(features_NPD)} tiles for a layout of {layout.tiles}")
    dim = features_NPD.shape[-1]
    side = layout.tile // layout.patch
    grid = features_NPD[1:].view(layout.rows, layout.columns, side, side, dim)
    grid = grid.transpose(1, 2).reshape(layout.rows * side, layout.columns * side, dim)
    grid = _without_padding(grid, layout)
    newlines = newline_D.expand(layout.patch_rows, 1, dim)
    rows = torch.cat([grid, newlines], dim=1)
    return torch.cat([features_NPD[0], rows.flatten(0, 1)])


def _without_padding(grid: Tensor, layout: Layout) -> Tensor:
    """The middle of the grid; both sides lose the same number of rows or columns."""
    top = (grid.shape[0] - layout.patch_rows) // 2
    left = (grid.shape[1] - layout.patch_columns) // 2
    return grid[top : top + layout.patch_rows, left : left + layout.patch_columns]
