"""Images for every test: photographs and pages that are fine, odd ones, and all kinds of bad ones.

Photographs are the files that scikit-image and scikit-learn ship inside their packages; nothing
is downloaded. The same arguments give the same bytes.
"""

import functools
import importlib.util
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from schemas.errors import Reason

# The grids of the released preprocessor_config.json, (width, height) in pixels.
_SIDES = range(336, 2017, 336)
RELEASED_PINPOINTS = tuple(
    (w, h) for w in _SIDES for h in _SIDES if min(w, h) <= 1008 or w == h == 1344
)

PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "camera": "skimage/data/camera.png",
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "clock": "skimage/data/clock_motion.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
_WORDS = (
    "total",
    "invoice",
    "date",
    "paid",
    "order",
    "net",
    "sum",
    "due",
    "item",
    "of",
    "and",
    "to",
)


def encode(image: Image.Image, encoding: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


@functools.cache
def _packaged(name: str) -> Image.Image:
    package, _, inside = PHOTOGRAPHS[name].partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is missing; install the demo extra"
    assert spec.origin is not None
    image = Image.open(Path(spec.origin).parent / inside)
    image.load()
    return image


def photograph(name: str = "china", size: tuple[int, int] | None = None) -> Image.Image:
    """One of PHOTOGRAPHS in RGB, resized to (width, height) if asked."""
    image = _packaged(name).convert("RGB")
    return image if size is None else image.resize(size, Image.Resampling.BICUBIC)


def page(seed: int = 0, size: tuple[int, int] = (1240, 1754)) -> Image.Image:
    """A page of an invoice, more or less: a heading and lines of words and numbers."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    margin, line = size[0] // 12, max(8, size[1] // 50)
    font = ImageFont.load_default(line * 0.6)
    draw.text((margin, margin // 2), f"Invoice {seed:05}", "black", ImageFont.load_default(line))
    for y in range(margin + line, size[1] - margin, line):
        words = " ".join(rng.choice(_WORDS) for _ in range(7))
        draw.text((margin, y), f"{words} {rng.uniform(1, 999):.2f}", "black", font)
    return image


def good_images(n: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """n ordinary images of at most 800 pixels a side, four photographs to a page: (name, bytes)."""
    rng = random.Random(seed)
    images = []
    for i in range(n):
        size = (rng.randrange(100, 800), rng.randrange(100, 800))
        encoding = rng.choices(list(_EXTENSIONS), weights=(12, 3, 2, 1, 1))[0]
        kind = "page" if i % 5 == 4 else rng.choice(list(PHOTOGRAPHS))
        image = page(rng.randrange(10**5), size) if kind == "page" else _crop(kind, size, rng)
        images.append((f"{i:05}-{kind}.{_EXTENSIONS[encoding]}", encode(image, encoding)))
    return images


def _crop(name: str, size: tuple[int, int], rng: random.Random) -> Image.Image:
    whole = photograph(name)
    width, height = min(size[0], whole.width), min(size[1], whole.height)
    left, top = rng.randint(0, whole.width - width), rng.randint(0, whole.height - height)
    return whole.crop((left, top, left + width, top + height))


def odd_images() -> list[tuple[str, bytes]]:
    """Images of unusual kinds that must all be prepared: (name, bytes)."""
    photo = photograph("chelsea", (120, 80))
    see_through = photo.copy()
    see_through.putalpha(Image.linear_gradient("L").resize(photo.size))
    palette = photo.quantize(64)
    frames = [photo, photo.rotate(180)]
    jpeg = encode(photo, "JPEG")
    return [
        ("one-pixel.png", encode(photo.resize((1, 1)), "PNG")),
        ("one-row.png", encode(photo.resize((5000, 1)), "PNG")),
        ("one-column.png", encode(photo.resize((1, 5000)), "PNG")),
        ("palette.png", encode(palette, "PNG")),
        ("palette.gif", encode(palette, "GIF")),
        ("palette-see-through.png", encode(palette, "PNG", transparency=3)),
        ("rgba.png", encode(see_through, "PNG")),
        ("grey-alpha.png", encode(see_through.convert("LA"), "PNG")),
        ("grey.jpg", encode(photo.convert("L"), "JPEG")),
        ("one-bit.png", encode(photo.convert("1"), "PNG")),
        ("one-bit-fax.tif", encode(photo.convert("1"), "TIFF", compression="group4")),
        ("16-bit.png", encode(Image.fromarray(sixteen_bits()), "PNG")),
        ("cmyk.jpg", encode(photo.convert("CMYK"), "JPEG")),
        ("progressive.jpg", encode(photo, "JPEG", progressive=True)),
        ("animated.gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        ("animated.webp", encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])),
        ("two-pages.tif", encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])),
        ("jpeg-called.png", jpeg),
        ("png-called.jpg", encode(photo, "PNG")),
        ("no-extension", jpeg),
        ("rotated.jpg", encode(photo, "JPEG", exif=orientation(6))),
    ]


def grey_tiff(bits: int, white: int, pages: int = 1) -> bytes:
    """Of 100 x 100 pixels of 3/4 of the way to white. white: 0, or 1 for the largest number."""
    level = round((2**bits - 1) * (0.75 if white else 0.25))
    row = np.unpackbits(np.array([level] * 100, ">u2").view(np.uint8)).reshape(100, 16)
    pixels = np.packbits(row[:, 16 - bits :]).tobytes() * 100 if bits < 16 else None
    data = pixels or np.full((100, 100), level, "<u2").tobytes()
    out, start = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data, 8 + len(data)
    for page in range(pages):
        short = [(256, 100), (257, 100), (258, bits), (259, 1), (262, white), (277, 1), (278, 100)]
        long = [(273, 8), (279, len(data))]
        tags = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in short]
        tags += [struct.pack("<HHII", tag, 4, 1, value) for tag, value in long]
        after = start + (page + 1) * (2 + 12 * len(tags) + 4)
        out += struct.pack("<H", len(tags)) + b"".join(
            sorted(tags, key=lambda tag: struct.unpack_from("<H", tag))
        )
        out += struct.pack("<I", after if page + 1 < pages else 0)
    return out


def sixteen_bits() -> np.ndarray:
    """uint16 [100, 656]: the whole range from black to white."""
    return (
        np.arange(0, 65_600, dtype=np.uint32).clip(max=65_535).astype(np.uint16).reshape(100, 656)
    )


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def damaged_exif(value: int) -> bytes:
    """The same orientation, beside a maker's name that is a fraction."""
    maker = struct.pack("<HHII", 0x010F, 5, 1, 8)
    turn = struct.pack("<HHIHH", 0x0112, 3, 1, value, 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + maker + turn + bytes(4)


def bad_images() -> list[tuple[str, bytes, Reason]]:
    """Twenty kinds of bytes that are no usable image: (name, bytes, the reason each must get)."""
    photo = photograph("chelsea", (240, 160))
    whole = {name: encode(photo, name) for name in (*_EXTENSIONS, "GIF", "AVIF")}
    damaged = {
        "truncated.jpg": _half(whole["JPEG"]),
        "header-only.jpg": whole["JPEG"][:20],
        "truncated.png": _half(whole["PNG"]),
        "header-only.png": whole["PNG"][:20],
        "corrupt.png": _garble(whole["PNG"]),
        "truncated.webp": _half(whole["WEBP"]),
        "truncated.gif": _half(whole["GIF"]),
        "truncated.bmp": _half(whole["BMP"]),
        "truncated.tif": _half(whole["TIFF"]),
        "truncated.avif": _half(whole["AVIF"]),
        "floats.tif": encode(photo.convert("F"), "TIFF"),
    }
    no_image = {
        "text.jpg": b"This is not a photograph.\n",
        "error-page.jpg": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
        "drawing.svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "document.pdf.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "noise.jpg": random.Random(0).randbytes(5000),
        "zeros.jpg": bytes(5000),
    }
    huge = {"huge.png": _blank_png(30_000, 30_000), "huge.jpg": _claim_size(whole["JPEG"], 60_000)}
    return [
        *((name, data, Reason.DECODE_ERROR) for name, data in damaged.items()),
        *((name, data, Reason.NOT_AN_IMAGE) for name, data in no_image.items()),
        *((name, data, Reason.TOO_MANY_PIXELS) for name, data in huge.items()),
        ("empty.jpg", b"", Reason.EMPTY_FILE),
    ]


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _garble(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + random.Random(0).randbytes(64) + data[middle + 64 :]


@functools.cache
def _blank_png(width: int, height: int) -> bytes:
    """A whole, valid PNG of one bit a pixel: a hundred kilobytes, however large it unpacks."""
    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _claim_size(jpeg: bytes, side: int) -> bytes:
    """The JPEG with `side` written as width and height into its frame header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4 :]
