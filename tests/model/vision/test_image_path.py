"""From an image's bytes to the order of its tokens, against the rules walked through one by one:
which patch of the resized image stands at which place, for sizes of every shape."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from model.inputs.images import image_size, prepare_image
from model.inputs.tiling import choose_layout
from model.vision.packing import pack
from tests.images import RELEASED_PINPOINTS, encode

TILE, PATCH, SIDE = 336, 14, 24
NEWLINE = -1.0


def _sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Extremes, a pixel beside the grids and beside their proportions, and of every magnitude."""
    rng = random.Random(seed)
    sizes = [(1, 1), (20_000, 3), (3, 20_000), (20_000, 1), (1, 20_000), (13, 14), (2016, 27)]
    for _ in range(count):
        width, height = rng.choice(RELEASED_PINPOINTS)
        by = rng.choice([1, 1, 0.5, 0.25, 1 / 24, 1 / 336])
        width, height = (
            max(1, round(side * by) + rng.choice([-1, 0, 0, 1])) for side in (width, height)
        )
        sizes += [(width, height), (int(10 ** rng.uniform(0, 3.3)), int(10 ** rng.uniform(0, 3.3)))]
    return sizes


def _grid(width: int, height: int) -> tuple[int, int]:
    """Most pixels kept, then least wasted."""
    best, most, least = (0, 0), -1, 0
    for grid in RELEASED_PINPOINTS:
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = grid[0] * grid[1] - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = grid, kept, wasted
    return best


def _patch(image: Image.Image, column: int, row: int) -> np.ndarray:
    left, top = column * PATCH, row * PATCH
    return np.asarray(image.crop((left, top, left + PATCH, top + PATCH))).reshape(-1)


def _expected(image: Image.Image) -> list[np.ndarray]:
    """The patch at each image token; NEWLINE after each row."""
    width, height = image.size
    bicubic, newline = Image.Resampling.BICUBIC, np.full(PATCH * PATCH * 3, NEWLINE)
    thumbnail = image.resize((TILE, TILE), bicubic)
    packed = [_patch(thumbnail, n % SIDE, n // SIDE) for n in range(SIDE * SIDE)]
    grid_width, grid_height = _grid(width, height)
    columns, rows = grid_width // PATCH, grid_height // PATCH
    left = top = 0
    if width * rows > height * columns:  # wide: it touches both sides
        size = grid_width, height * grid_width // width
        top = (rows - height * columns // width) // 2
    else:
        size = width * grid_height // height, grid_height
        left = (columns - width * rows // height) // 2
    size = max(1, size[0]), max(1, size[1])
    canvas = Image.new("RGB", (grid_width, grid_height))
    canvas.paste(
        image.resize(size, bicubic), ((grid_width - size[0]) // 2, (grid_height - size[1]) // 2)
    )
    for row in range(top, rows - top):
        packed += [_patch(canvas, column, row) for column in range(left, columns - left)]
        packed.append(newline)
    return packed


@pytest.mark.parametrize("size", _sizes(12, seed=1), ids=lambda size: f"{size[0]}x{size[1]}")
def test_each_image_token_is_the_patch_that_the_rules_put_there(size):
    rng = np.random.default_rng(size[0] * 20_001 + size[1])
    # Coarse noise, so that no two patches look alike, also where few pixels become many.
    noise = Image.fromarray(rng.integers(0, 256, (97, 89, 3), dtype=np.uint8))
    image = noise.resize(size)
    data = encode(image, "PNG")
    tiles = prepare_image(data, RELEASED_PINPOINTS, TILE)
    expected = np.stack(_expected(image))

    seen = choose_layout(*image_size(io.BytesIO(data)), RELEASED_PINPOINTS, TILE, PATCH)
    assert seen == tiles.layout
    assert seen.tokens == len(expected)
    patches = tiles.tiles.reshape(-1, SIDE, PATCH, SIDE, PATCH, 3).swapaxes(2, 3)
    features = torch.from_numpy(patches.reshape(len(tiles.tiles), SIDE * SIDE, -1)).double()
    packed = pack(features, torch.full((features.shape[-1],), NEWLINE).double(), tiles.layout)
    np.testing.assert_array_equal(packed.numpy(), expected)
