"""Blank pages: noise, shading and a scanner's shadow are nothing; a page number is something."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from model.inputs.blank import is_blank
from tests.images import page, photograph

A4_DPI = (100, 150, 300)


def paper(dpi: int = 300, colour=(255, 255, 255)) -> Image.Image:
    return Image.new("RGB", (round(8.27 * dpi), round(11.69 * dpi)), colour)


def scanned(image: Image.Image, quality: int = 75, noise: float = 0.0, shade: float = 0.0):
    """With noise (standard deviation) and a shading across the page, as JPEG."""
    rng = np.random.default_rng(0)
    pixels = np.asarray(image, np.float32)
    ramp = np.linspace(0, shade, pixels.shape[1], dtype=np.float32)[None, :, None]
    pixels = pixels - ramp + rng.normal(0, noise, pixels.shape[:2])[..., None]
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def with_text(image: Image.Image, text: str, points: float, dpi: int, ink="black", at=(0.5, 0.955)):
    draw = ImageDraw.Draw(image)
    where = image.width * at[0], image.height * at[1]
    draw.text(where, text, ink, ImageFont.load_default(points / 72 * dpi), anchor="mm")
    return image


def edge(image: Image.Image) -> Image.Image:
    draw = ImageDraw.Draw(image)
    width = image.width // 80
    draw.rectangle((0, 0, width, image.height), "black")
    draw.rectangle((0, image.height - width, image.width, image.height), (40, 40, 40))
    return image


BLANK = {
    "white": paper(),
    "yellowed": paper(colour=(236, 224, 190)),
    "black": paper(colour=(0, 0, 0)),
    "grey mode": paper().convert("L"),
    "a scan": scanned(paper(300, (246, 245, 240)), noise=5),
    "a poor scan": scanned(paper(300, (235, 233, 228)), quality=40, noise=8),
    "a scan at 150 dpi": scanned(paper(150, (246, 245, 240)), noise=3),
    "unevenly lit": scanned(paper(150), noise=2, shade=90),
    "a dark edge": edge(scanned(paper(300, (246, 245, 240)), noise=4).convert("RGB")),
    "two specks of dust": with_text(paper(), ".", 2, 300),
    "a pixel": Image.new("RGB", (1, 1), "white"),
    "a strip": Image.new("L", (5000, 3), "white"),
}


@pytest.mark.parametrize("name", BLANK)
def test_an_empty_page_is_blank_however_it_was_scanned(name):
    assert is_blank(BLANK[name])


@pytest.mark.parametrize("dpi", A4_DPI)
@pytest.mark.parametrize("text", ["1", "7", "12", "- 3 -", "i", "x"])
@pytest.mark.parametrize("at", [(0.5, 0.955), (0.94, 0.03), (0.04, 0.97)])
def test_a_page_with_nothing_but_its_number_is_not_blank(dpi, text, at):
    assert not is_blank(with_text(paper(dpi), text, 8, dpi, at=at))


@pytest.mark.parametrize("ink", ["#999999", "#cc6666", "yellow", "#8888ff"])
def test_a_pale_number_is_not_blank(ink):
    assert not is_blank(with_text(paper(300), "12", 10, 300, ink))


def test_a_number_is_seen_through_noise_and_on_dark_paper():
    noisy = scanned(with_text(paper(300, (230, 225, 210)), "4", 9, 300), quality=50, noise=6)
    assert not is_blank(noisy)
    assert not is_blank(with_text(paper(300, (40, 40, 40)), "4", 9, 300, "white"))


def test_white_on_nearly_white_is_seen_as_far_as_promised():
    assert not is_blank(with_text(paper(300), "Continued", 11, 300, "#cccccc"))


@pytest.mark.parametrize("size", [(1240, 1754), (400, 300), (64, 90)])
def test_pages_and_photographs_are_not_blank(size):
    assert not is_blank(page(1, size))
    assert not is_blank(photograph("china", size))


def test_ruled_paper_is_left_to_the_model():
    ruled = paper(150)
    draw = ImageDraw.Draw(ruled)
    for y in range(200, 1600, 60):
        draw.line((100, y, 1100, y), "#aaaaff", 2)
    assert not is_blank(ruled)
