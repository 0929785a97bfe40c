"""Pages made on the fly: the image as a file would hold it, and the truth about it.

A page follows from its split, its number and its size alone.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageFilter

from model.nano.pages.content import Content
from model.nano.pages.fonts import Family
from model.nano.pages.invoice import invoice
from model.nano.pages.prose import form, grid, letter, plain
from model.nano.pages.receipt import receipt
from model.nano.pages.sheet import NoRoomError, Sheet, Style
from model.nano.pages.words import Words

KINDS = {
    "receipt": receipt,
    "invoice": invoice,
    "letter": letter,
    "form": form,
    "table": grid,
    "text": plain,
}


@dataclass(frozen=True)
class Wear:
    """How much a page may have suffered, 0 (clean) to 1."""

    tilt: float = 1.0
    noise: float = 1.0
    jpeg: float = 1.0


@dataclass(frozen=True)
class Page:
    """image: mode L. glyphs: every character on it, spaces too. centres: [glyphs, 2], the (x, y) of
    each in pixels."""

    content: Content
    image: Image.Image
    glyphs: str
    centres: np.ndarray
    style: Style


def make_page(
    seed: str,
    width: int,
    height: int,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    families: Sequence[Family],
    wear: Wear = Wear(),
    zoom: float = 1.0,
    sizes: tuple[int, int] = (15, 22),
) -> Page:
    """Draw the page that `seed` stands for. `sizes`: least and most font size, times `zoom`."""
    random = Random(seed)
    kind = random.choice(tuple(kinds))
    for attempt in range(100):
        style = _style(random, families, zoom, sizes)
        sheet = Sheet(width, height, style)
        try:
            content = KINDS[kind](sheet, Words(random))
        except NoRoomError:
            if attempt > 4:  # a kind that needs more room than this sheet has at any size
                sizes = (sizes[0], max(sizes[0], sizes[1] - 1))
            continue
        image, centres = _suffer(sheet.image, np.array(sheet.centres), random, wear, style)
        return Page(content, image, "".join(sheet.glyphs), centres, style)
    raise ValueError(f"no {kind} fits {width} x {height} pixels at font sizes from {sizes[0]}")


def _style(
    random: Random, families: Sequence[Family], zoom: float, sizes: tuple[int, int]
) -> Style:
    return Style(
        family=random.choice(families),
        size=round(random.randint(*sizes) * zoom),
        leading=random.uniform(1.15, 1.45),
        margin=round(random.randint(8, 30) * zoom),
        ink=random.choice((0, 0, random.randint(0, 90))),
        paper=random.choice((255, 255, random.randint(200, 255))),
    )


def _suffer(
    image: Image.Image, centres: np.ndarray, random: Random, wear: Wear, style: Style
) -> tuple[Image.Image, np.ndarray]:
    """Tilted, blurred, noisy, squeezed through JPEG: each now and then."""
    if random.random() < 0.4 * wear.tilt:
        image, centres = _tilt(image, centres, random.gauss(0, 0.7), style.paper)
    if random.random() < 0.15 * wear.noise:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 0.7)))
    if random.random() < 0.5 * wear.noise:
        image = _speckle(image, random)
    if random.random() < 0.4 * wear.jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=random.randint(35, 90))
        image = Image.open(buffer)
        image.load()
    return image, centres


def _tilt(
    image: Image.Image, centres: np.ndarray, degrees: float, paper: int
) -> tuple[Image.Image, np.ndarray]:
    """Counter-clockwise around the middle, as Pillow does it."""
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=paper)
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    middle = np.array(image.size) / 2
    return turned, (centres - middle) @ turn.T + middle


_noise: np.ndarray | None = None
_NOISE_SIDE = 1 << 20


def _speckle(image: Image.Image, random: Random) -> Image.Image:
    """Gaussian noise, cut from one long strip: drawing it anew costs more than the page."""
    global _noise
    if _noise is None:
        _noise = np.random.default_rng(0).standard_normal(_NOISE_SIDE).astype(np.float32)
    pixels = np.asarray(image, np.float32)
    start = random.randrange(_NOISE_SIDE)
    noise = np.resize(np.roll(_noise, start), pixels.size) if pixels.size > _NOISE_SIDE else (
        np.take(_noise, np.arange(start, start + pixels.size), mode="wrap"))  # fmt: skip
    noisy = pixels + random.uniform(2, 14) * noise.reshape(pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
