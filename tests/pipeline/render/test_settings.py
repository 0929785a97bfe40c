"""A page is rendered as large as the model can see it, and never larger than the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.inputs.tiling import choose_grid, fitted_size
from pipeline.render.settings import PageSettings, page_pixels
from schemas.errors import Reason, RowError
from tests.images import RELEASED_PINPOINTS

POINTS = st.floats(0.01, 1e8)


@pytest.mark.parametrize(
    ("points", "pixels"),
    [
        ((595, 842), (1008, 1426)),  # A4 upright: two tiles more than 1344x1344 has
        ((842, 595), (1426, 1008)),
        ((612, 612), (1344, 1344)),
        ((100_000, 800), (2016, 16)),
        ((100_000, 1), (2016, 1)),
    ],
)
def test_a_page_fills_the_best_grid_for_its_shape(points, pixels):
    assert page_pixels(points[0], points[1], PageSettings(RELEASED_PINPOINTS)) == pixels


@given(POINTS, POINTS)
def test_the_grid_chosen_later_takes_the_page_as_it_was_rendered(width, height):
    """No pixel is rendered in vain, and none is made up by enlarging."""
    pixels = page_pixels(width, height, PageSettings(RELEASED_PINPOINTS))
    grid = choose_grid(*pixels, RELEASED_PINPOINTS)
    assert pixels[0] <= grid[0]
    assert pixels[1] <= grid[1]
    assert max(pixels[0] / grid[0], pixels[1] / grid[1]) == 1 or min(pixels) == 1
    assert min(fitted_size(*pixels, *grid)) >= 1


def test_dpi_is_what_was_asked_for():
    assert page_pixels(595, 842, PageSettings(dpi=144)) == (1190, 1684)


@given(POINTS, POINTS, st.one_of(st.none(), st.floats(1, 10_000)))
def test_no_page_exceeds_the_budget_of_pixels(width, height, dpi):
    settings = PageSettings(RELEASED_PINPOINTS, dpi=dpi, max_pixels=1_000_000)
    pixels = page_pixels(width, height, settings)
    assert pixels[0] * pixels[1] <= settings.max_pixels
    assert min(pixels) >= 1


@pytest.mark.parametrize("side", [0.0, -1.0, float("inf"), float("nan")])
def test_a_page_without_a_size_is_damaged(side):
    with pytest.raises(RowError) as caught:
        page_pixels(side, 100, PageSettings())
    assert caught.value.reason is Reason.PAGE_DAMAGED
