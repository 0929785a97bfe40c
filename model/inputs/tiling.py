"""The geometry of an image's tiles and tokens, in whole numbers. Knows no pixels and no model.

Follows the released MiniMax-VL-01 processor to the pixel. Where LLaVA-NeXT in transformers rounds
the resized side up, the released processor rounds it down, and 99% of sizes differ by a pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Pinpoints = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """How one image is cut into tiles, and what the language model sees of it.

    The patch grid is what is left of the tile grid once the padding is removed, by the released
    rounding, so it can hold a row or column of padding. It is empty (and the thumbnail is all the
    model sees) when the short side of the image would be less than one patch.
    """

    columns: int  # tiles from left to right, without the thumbnail
    rows: int
    patch_columns: int  # patches from left to right, without the padding
    patch_rows: int
    tile: int  # pixels a side
    patch: int  # pixels a side

    @property
    def tiles(self) -> int:
        """Tiles in all, the thumbnail included."""
        return 1 + self.columns * self.rows

    @property
    def tokens(self) -> int:
        """Image tokens in all: the thumbnail's patches, then each row of patches and a newline."""
        return (self.tile // self.patch) ** 2 + (self.patch_columns + 1) * self.patch_rows


def choose_layout(
    width: int, height: int, pinpoints: Pinpoints, tile: int = 336, patch: int = 14
) -> Layout:
    """The layout of an image of `width` x `height` pixels.

    pinpoints: the grids allowed, (width, height) in pixels, multiples of `tile`.
    Raises ValueError for an empty image, and for a grid that tiles or patches do not fill.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels; expected at least 1 x 1")
    grid_width, grid_height = choose_grid(width, height, pinpoints)
    if tile % patch or grid_width % tile or grid_height % tile:
        raise ValueError(
            f"a grid of {grid_width} x {grid_height} pixels, tiles of {tile}, patches of {patch}: "
            "expected the grid in whole tiles and the tile in whole patches"
        )
    patch_columns, patch_rows = _unpadded(width, height, grid_width // patch, grid_height // patch)
    return Layout(grid_width // tile, grid_height // tile, patch_columns, patch_rows, tile, patch)


def choose_grid(width: int, height: int, pinpoints: Pinpoints) -> tuple[int, int]:
    """The pinpoint that keeps most of the image's pixels; on a tie the one that wastes least.

    The scale is a float, rounding errors included, as in LLaVA-NeXT's `select_best_resolution`.
    """

    def kept_and_wasted(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=kept_and_wasted)


def fitted_size(width: int, height: int, grid_width: int, grid_height: int) -> tuple[int, int]:
    """(width, height) in pixels of the image resized to touch the grid, its aspect kept.

    Never less than a pixel: the released processor fails on an image so thin that it would be.
    """
    fitted_width, fitted_height = _fit(width, height, grid_width, grid_height)
    return max(1, fitted_width), max(1, fitted_height)


def _unpadded(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """The patch grid less its padding: half of what the image leaves free, rounded down, a side."""
    fitted_columns, fitted_rows = _fit(width, height, columns, rows)
    return columns - (columns - fitted_columns) // 2 * 2, rows - (rows - fitted_rows) // 2 * 2


def _fit(width: int, height: int, box_width: int, box_height: int) -> tuple[int, int]:
    """The image scaled into a box: one side fills it, the other is rounded down, to 0 if thin."""
    if width * box_height > height * box_width:
        return box_width, height * box_width // width
    return width * box_height // height, box_height
