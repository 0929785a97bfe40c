"""Turns an image that is already in tiles, with the prompt around it. Knows neither file nor model.

Legend: H height and W width in pixels, C colours.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from model.inputs.images import cut
from model.inputs.prompt import PromptTemplate
from model.inputs.tiling import Layout, Pinpoints, choose_layout, fitted_size
from schemas.requests import Request


@dataclass(frozen=True)
class Turner:
    """pinpoints, tile, patch: as the image was tiled; template: as its prompt was made."""

    template: PromptTemplate
    pinpoints: Pinpoints
    tile: int
    patch: int

    def turn(self, request: Request, degrees: int) -> Request:
        """The request with its image turned clockwise by 90, 180 or 270 degrees.

        Where the pinpoints allow each grid on its side too, as the released ones do, its pixels
        are only moved. That is the same as tiling the turned image: exactly so for 180 degrees,
        and up to how resizing rounds for 90 and 270 (0.2 of 255 in the mean). Elsewhere they are
        resized once more.
        """
        assert request.tiles is not None
        assert request.image_size is not None
        width, height = request.image_size
        fitted = fitted_pixels(request.tiles, self.layout(width, height), request.image_size)
        pixels_HWC = np.rot90(fitted, -degrees // 90)
        if degrees % 180:
            width, height = height, width
        layout = self.layout(width, height)
        wanted = fitted_size(width, height, layout.columns * self.tile, layout.rows * self.tile)
        if wanted != (pixels_HWC.shape[1], pixels_HWC.shape[0]):
            image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
            pixels_HWC = np.asarray(image.resize(wanted, Image.Resampling.BICUBIC))
        tiles = np.empty((layout.tiles, *request.tiles.shape[1:]), np.uint8)
        tiles[0] = np.rot90(request.tiles[0], -degrees // 90)
        cut(pixels_HWC, layout, tiles[1:])
        return replace(
            request,
            token_ids=self.template.fill(layout.tokens),
            tiles=tiles,
            image_size=(width, height),
        )

    def layout(self, width: int, height: int) -> Layout:
        return choose_layout(width, height, self.pinpoints, self.tile, self.patch)


def fitted_pixels(tiles_NTTC: np.ndarray, layout: Layout, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, C]: the resized image that the tiles after the thumbnail were cut from.

    size: (width, height) of the image before it was resized.
    """
    side = layout.tile
    grid_HW = layout.rows * side, layout.columns * side
    by_tile = tiles_NTTC[1:].reshape(layout.rows, layout.columns, side, side, 3)
    canvas = by_tile.swapaxes(1, 2).reshape(*grid_HW, 3)
    width, height = fitted_size(*size, grid_HW[1], grid_HW[0])
    top, left = (grid_HW[0] - height) // 2, (grid_HW[1] - width) // 2
    return canvas[top : top + height, left : left + width]
