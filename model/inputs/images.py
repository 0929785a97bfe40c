"""Bytes of an image -> uint8 tiles, within limits of bytes, pixels and seconds. Knows no model.

What is looked at is what a viewer shows: transparency is laid on white (the released processor
drops alpha, which uncovers whatever colour lies beneath), 16-bit grey keeps its high byte (Pillow's
`convert` would clip it to white), an animation is its first frame. CMYK and the other colour spaces
go through Pillow's `convert("RGB")`. The name and extension of a file play no part.
"""

import io
import threading
import time
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from model.inputs.blank import is_blank
from model.inputs.tiling import Layout, Pinpoints, choose_layout, fitted_size
from schemas.errors import Reason, RowError

# Every format read here, by how its bytes begin. Pillow knows more; some run other programs (EPS).
_SIGNATURES = (
    ("JPEG", 0, (b"\xff\xd8\xff",)),
    ("PNG", 0, (b"\x89PNG\r\n\x1a\n",)),
    ("WEBP", 8, (b"WEBP",)),
    ("GIF", 0, (b"GIF87a", b"GIF89a")),
    ("TIFF", 0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("AVIF", 4, (b"ftypavif", b"ftypavis")),
    ("JPEG2000", 0, (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")),
    ("BMP", 0, (b"BM",)),
)
_BITS, _PHOTOMETRIC, _ORIENTATION = 0x0102, 0x0106, 0x0112  # tags of TIFF, the last of EXIF too
_WHITE_IS_ZERO = 0
_SIDEWAYS = (5, 6, 7, 8)  # its values that swap width and height
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what turns an image with this value
_PILLOW_LIMIT = threading.Lock()


@dataclass(frozen=True)
class DecodeLimits:
    """What one image may cost.

    Memory, measured, in bytes a pixel at the peak: JPEG 4 (progressive 7), transparent PNG 9,
    WebP 16, so up to 1.6 GB at the default `max_pixels`.
    `seconds` of wall time are checked at every read of the data (64 KiB for JPEG and PNG) and
    between the steps, in any thread and without signals. A codec that takes the data in one piece
    (WebP, AVIF, compressed TIFF) is only noticed to be late once it returns; `max_pixels` bounds
    it. Pillow refuses a TIFF of more than 178,956,970 pixels whatever `max_pixels` allows.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 256 * 1024 * 1024
    seconds: float = 60.0


@dataclass(frozen=True)
class Tiles:
    """An image as the vision tower takes it.

    tiles: uint8 [layout.tiles, tile, tile, 3] RGB, the thumbnail first, then row by row.
    width, height: pixels of the image that was tiled, after any rotation.
    note: what was done to the image beyond decoding it, in words; empty when nothing was.
    blank: whether there is nothing on it, if that was looked for.
    """

    tiles: np.ndarray
    width: int
    height: int
    layout: Layout
    note: str = ""
    blank: bool = False


def prepare_image(
    data: bytes,
    pinpoints: Pinpoints,
    tile: int = 336,
    limits: DecodeLimits = DecodeLimits(),
    exif_rotate: bool = False,
    patch: int = 14,
    find_blank: bool = False,
) -> Tiles:
    """Decode an image and cut it into tiles, to the pixel as the released processor does.

    Resizing is Pillow's own bicubic. `exif_rotate` turns the image upright as its EXIF says; the
    released processor does not (but Pillow always turns a TIFF). Raises RowError: EMPTY_FILE,
    TOO_MANY_BYTES, NOT_AN_IMAGE, TOO_MANY_PIXELS, DECODE_ERROR or TIMEOUT.
    """
    source = _DeadlineReader(data, limits)
    image, note = _decode(source, limits, exif_rotate)
    layout = choose_layout(image.width, image.height, pinpoints, tile, patch)
    grid = (layout.columns * tile, layout.rows * tile)
    tiles = np.empty((layout.tiles, tile, tile, 3), np.uint8)
    source.check()
    tiles[0] = _pixels(image.resize((tile, tile), Image.Resampling.BICUBIC))
    source.check()
    fitted = image.resize(fitted_size(*image.size, *grid), Image.Resampling.BICUBIC)
    cut(_pixels(fitted), layout, tiles[1:])
    blank = find_blank and is_blank(image)
    return Tiles(tiles, image.width, image.height, layout, note, blank)


def image_size(
    file: IO[bytes], limits: DecodeLimits = DecodeLimits(), exif_rotate: bool = False
) -> tuple[int, int]:
    """(width, height) in pixels of the image that `prepare_image` would tile, from its header.

    Reads no further than the header where the format allows (not WebP and AVIF). Raises RowError
    as `prepare_image` does, as far as a header tells: what follows it may still be damaged.
    """
    name = _recognise(file.read(16))
    file.seek(0)
    try:
        image = _open(file, name)
        _check_pixels(image, limits)
        turned = exif_rotate and _lies_on_its_side(image, name)
    except RowError:
        raise
    except Exception as error:
        raise _undecodable(name, error) from error
    return (image.height, image.width) if turned else image.size


def _lies_on_its_side(image: Image.Image, name: str) -> bool:
    # Pillow turns a TIFF itself, and would decode a whole PNG to find EXIF after its pixels.
    if name == "TIFF" or (name == "PNG" and "exif" not in image.info):
        return False
    return image.getexif().get(_ORIENTATION) in _SIDEWAYS


def cut(pixels_HWC: np.ndarray, layout: Layout, tiles_NTTC: np.ndarray) -> None:
    """Centre the pixels on a black grid and write the grid's tiles, row by row."""
    side = layout.tile
    height, width = layout.rows * side, layout.columns * side
    top, left = (height - pixels_HWC.shape[0]) // 2, (width - pixels_HWC.shape[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + pixels_HWC.shape[0], left : left + pixels_HWC.shape[1]] = pixels_HWC
    by_tile = canvas.reshape(layout.rows, side, layout.columns, side, 3).swapaxes(1, 2)
    tiles_NTTC.reshape(by_tile.shape)[:] = by_tile


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [height, width, 3], or [height, width, 1] of a grey image, which broadcasts to it."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


class _DeadlineReader(io.BytesIO):
    """The data of an image, refused when it is too long and once its time is up."""

    def __init__(self, data: bytes, limits: DecodeLimits) -> None:
        if len(data) > limits.max_bytes:
            raise RowError(
                Reason.TOO_MANY_BYTES,
                f"{len(data):,} bytes; expected at most {limits.max_bytes:,} (max_bytes)",
            )
        super().__init__(data)
        self._seconds = limits.seconds
        self._deadline = time.monotonic() + limits.seconds

    def check(self) -> None:
        if time.monotonic() > self._deadline:
            raise RowError(
                Reason.TIMEOUT, f"not prepared within {self._seconds:g} seconds (time limit)"
            )

    def read(self, size: int | None = -1, /) -> bytes:
        self.check()
        return super().read(size)


def _decode(
    source: _DeadlineReader, limits: DecodeLimits, exif_rotate: bool
) -> tuple[Image.Image, str]:
    """The image in mode RGB or L, and the note of what was done to it."""
    name = _recognise(source.read(16))
    try:
        image = _open(source, name)
        _check_pixels(image, limits)
        notes = ["first frame of several"] if getattr(image, "is_animated", False) else []
        image.load()
        source.check()
        if exif_rotate:
            image, turned = upright(image)
            notes += [turned] if turned else []
        image, flattened = _to_rgb(image)
        notes += flattened
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(Reason.TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:  # whatever a decoder does on damaged data, it costs one row
        raise _undecodable(name, error) from error
    return image, "; ".join(notes)


def _undecodable(name: str, error: Exception) -> RowError:
    damaged_header = isinstance(error, UnidentifiedImageError)
    what = "its header is damaged" if damaged_header else str(error) or type(error).__name__
    return RowError(Reason.DECODE_ERROR, f"cannot decode this {name}: {what}")


def _recognise(start: bytes) -> str:
    if not start:
        raise RowError(Reason.EMPTY_FILE, "0 bytes; expected an image or a document")
    for name, offset, signatures in _SIGNATURES:
        if start[offset:].startswith(signatures):
            return name
    known = ", ".join(name for name, _, _ in _SIGNATURES)
    raise RowError(Reason.NOT_AN_IMAGE, f"the data starts with {start!r}; expected {known}")


def _open(source: IO[bytes], name: str) -> Image.Image:
    """Read the header. Pillow's own limit of pixels is off meanwhile: ours is checked next."""
    with _PILLOW_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source, formats=(name,))
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_pixels(image: Image.Image, limits: DecodeLimits) -> None:
    if image.width * image.height > limits.max_pixels:
        raise RowError(
            Reason.TOO_MANY_PIXELS,
            f"{image.width} x {image.height} is {image.width * image.height:,} pixels; "
            f"expected at most {limits.max_pixels:,} (max_pixels)",
        )


def upright(image: Image.Image) -> tuple[Image.Image, str]:
    """The image as its EXIF tag says, and what was done to it, in words; empty if nothing was.

    Not by Pillow's `exif_transpose`, which also writes the other tags anew and raises what not
    where one of them is damaged."""
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation not in _UPRIGHT:
        return image, ""
    note = f"turned upright from EXIF orientation {orientation}"
    return image.transpose(_UPRIGHT[orientation]), note


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """In mode RGB, or L if it is grey: resized as one channel it gives the same pixels sooner."""
    if image.mode in ("I", "F"):
        raise ValueError(
            "its pixels are 32-bit numbers without a known white; expected 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):
        high_byte = np.asarray(sixteen_bits(image)) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)), ["16-bit grey reduced to 8 bits"]
    if image.has_transparency_data:
        return _flatten(image if image.mode == "RGBA" else image.convert("RGBA"))
    if image.mode in ("RGB", "L"):
        return image, []
    return image.convert("L" if image.mode == "1" else "RGB"), []


def sixteen_bits(image: Image.Image) -> Image.Image:
    """A grey image of mode I;16 or I;16B in I;16, from black to white: Pillow leaves numbers of 12
    bits, and those of which 0 is white, as a TIFF has them."""
    tags = getattr(image, "tag_v2", {})
    grey = image.convert("I")  # straight to I;16, Pillow clips I;16B to 8 bits
    if tags.get(_BITS) == (12,):
        grey = grey.point(lambda value: value * 16)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = grey.point(lambda value: value * -1 + 65_535)
    return grey.convert("I;16")


def _flatten(image: Image.Image) -> tuple[Image.Image, list[str]]:
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB"), []
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=alpha)
    return flat, ["transparency laid on white"]
