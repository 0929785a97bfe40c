import random
from fractions import Fraction

import pytest
from transformers.image_processing_utils import select_best_resolution

from model.inputs.tiling import choose_grid, choose_layout, fitted_size
from tests.images import RELEASED_PINPOINTS


def random_sizes(n: int, seed: int) -> list[tuple[int, int]]:
    """Sizes of every magnitude, square to a hundred times longer than wide."""
    rng = random.Random(seed)
    return [(int(10 ** rng.uniform(0, 4)), int(10 ** rng.uniform(0, 4))) for _ in range(n)]


SIZES = random_sizes(400, seed=1)
GRIDS = list(RELEASED_PINPOINTS)


def swap(pair: tuple[int, int]) -> tuple[int, int]:
    """transformers writes (height, width) where VL-01 writes (width, height)."""
    return pair[1], pair[0]


def slow_token_count(width: int, height: int) -> int:
    """The count as VL01's processor states it: sides in patches, exact fractions, then floors."""
    grid_height, grid_width = select_best_resolution((height, width), list(map(swap, GRIDS)))
    columns, rows = grid_width // 14, grid_height // 14
    if Fraction(width, height) > Fraction(columns, rows):
        left_over = rows - int(Fraction(height * columns, width))
        rows -= 2 * (left_over // 2)
    else:
        left_over = columns - int(Fraction(width * rows, height))
        columns -= 2 * (left_over // 2)
    return 576 + rows * (columns + 1)


def test_the_released_list_has_28_grids():
    assert len(set(GRIDS)) == 28


@pytest.mark.parametrize(
    ("width", "height", "tokens", "tiles"),
    # The A4 scan fits 1008 x 1680 and 1008 x 2016 alike: the tie goes to the least wasted.
    [(640, 480, 2340, 5), (1024, 768, 7560, 13), (1654, 2339, 8022, 16)],
)
def test_known_images_keep_their_token_counts(width, height, tokens, tiles):
    layout = choose_layout(width, height, GRIDS)
    assert (layout.tokens, layout.tiles) == (tokens, tiles)


def test_the_grid_is_the_one_llava_next_would_choose():
    for width, height in SIZES:
        expected = select_best_resolution((height, width), list(map(swap, GRIDS)))
        assert choose_grid(width, height, GRIDS) == swap(expected), (width, height)


def test_width_and_height_are_not_swapped_in_a_lopsided_list_of_grids():
    grids = [(336, 672), (1008, 336)]
    for width, height in SIZES:
        expected = select_best_resolution((height, width), list(map(swap, grids)))
        assert choose_grid(width, height, grids) == swap(expected), (width, height)


def test_the_token_count_is_the_released_one_for_any_size():
    for width, height in SIZES:
        assert choose_layout(width, height, GRIDS).tokens == slow_token_count(width, height)


def test_the_layout_scales_with_other_tiles_and_patches():
    for width, height in SIZES[:50]:
        small = choose_layout(width, height, [(56, 28), (28, 56), (56, 56)], tile=28, patch=7)
        assert small.tiles == 1 + small.columns * small.rows
        assert small.tokens == 16 + (small.patch_columns + 1) * small.patch_rows
        assert 0 <= small.patch_columns <= small.columns * 4
        assert 0 <= small.patch_rows <= small.rows * 4


def test_the_resized_side_is_rounded_down_never_up_and_never_to_nothing():
    for width, height in SIZES:
        grid = choose_grid(width, height, GRIDS)
        scale = min(Fraction(grid[0], width), Fraction(grid[1], height))
        expected = tuple(max(1, int(side * scale)) for side in (width, height))
        assert fitted_size(width, height, *grid) == expected


@pytest.mark.parametrize(
    ("width", "height"), [(5000, 1), (1, 5000), (30_000, 1), (2000, 10), (1, 1)]
)
def test_an_extreme_aspect_ratio_still_has_a_layout(width, height):
    layout = choose_layout(width, height, GRIDS)
    assert layout.tokens == slow_token_count(width, height) >= 576
    assert layout.tiles >= 2


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0 x 5"):
        choose_layout(0, 5, GRIDS)


def test_a_grid_that_tiles_do_not_fill_is_refused():
    with pytest.raises(ValueError, match=r"400 x 336 .* 336"):
        choose_layout(100, 100, [(400, 336)])
