import os
import random
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from model.inputs import images
from model.inputs.images import DecodeLimits, prepare_image
from model.inputs.tiling import choose_grid
from schemas.errors import Reason, RowError
from tests.images import (
    RELEASED_PINPOINTS,
    bad_images,
    damaged_exif,
    encode,
    good_images,
    grey_tiff,
    odd_images,
    orientation,
    page,
    photograph,
    sixteen_bits,
)

BICUBIC = Image.Resampling.BICUBIC


def prepare(data: bytes, **options):
    return prepare_image(data, RELEASED_PINPOINTS, **options)


def slow_tiles(image: Image.Image, tile: int = 336, pinpoints=RELEASED_PINPOINTS) -> np.ndarray:
    """The released processor, in Pillow's own calls: convert, resize, paste, crop tile by tile."""
    image = image.convert("RGB")
    grid_width, grid_height = choose_grid(*image.size, pinpoints)
    if image.width / image.height > grid_width / grid_height:
        size = (grid_width, int(grid_width * image.height / image.width))
    else:
        size = (int(grid_height * image.width / image.height), grid_height)
    size = (max(1, size[0]), max(1, size[1]))
    canvas = Image.new("RGB", (grid_width, grid_height), (0, 0, 0))
    corner = ((grid_width - size[0]) // 2, (grid_height - size[1]) // 2)
    canvas.paste(image.resize(size, BICUBIC), corner)
    tiles = [image.resize((tile, tile), BICUBIC)]
    for top in range(0, grid_height, tile):
        for left in range(0, grid_width, tile):
            tiles.append(canvas.crop((left, top, left + tile, top + tile)))
    return np.stack([np.asarray(t) for t in tiles])


def reason_for(data: bytes, **options) -> Reason:
    with pytest.raises(RowError) as raised:
        prepare(data, **options)
    assert raised.value.message
    return raised.value.reason


def reason_if_any(data: bytes, **options) -> Reason | None:
    try:
        prepare(data, **options)
    except RowError as error:
        return error.reason
    return None


def test_tiles_are_pillows_own_pixels_for_any_size():
    rng = random.Random(3)
    source = photograph("china")
    for _ in range(25):
        image = source.resize((int(10 ** rng.uniform(0, 3.2)), int(10 ** rng.uniform(0, 3.2))))
        np.testing.assert_array_equal(prepare(encode(image, "BMP")).tiles, slow_tiles(image))


@pytest.mark.parametrize("data", [d for _, d in good_images(12, seed=5)])
def test_tiles_of_every_format_are_pillows_own(data):
    with Image.open(images.io.BytesIO(data)) as image:
        np.testing.assert_array_equal(prepare(data).tiles, slow_tiles(image))


def test_grey_images_resized_as_one_channel_give_the_pixels_of_three():
    grey = photograph("camera").convert("L").resize((700, 333))
    np.testing.assert_array_equal(prepare(encode(grey, "PNG")).tiles, slow_tiles(grey))


def test_tiles_of_another_side_are_cut_by_the_same_rule():
    grids = [(56, 112), (112, 56), (112, 112)]
    image = photograph("coffee", (301, 97))
    prepared = prepare_image(encode(image, "PNG"), grids, 56, patch=14)
    np.testing.assert_array_equal(prepared.tiles, slow_tiles(image, 56, grids))


@pytest.mark.parametrize(("name", "data"), odd_images(), ids=[n for n, _ in odd_images()])
def test_an_odd_image_is_prepared_and_its_tiles_agree_with_its_layout(name, data):
    prepared = prepare(data)
    assert prepared.tiles.shape == (prepared.layout.tiles, 336, 336, 3)
    assert prepared.tiles.dtype == np.uint8
    with Image.open(images.io.BytesIO(data)) as image:
        assert (prepared.width, prepared.height) == image.size


@pytest.mark.parametrize(
    ("name", "data", "reason"), bad_images(), ids=[name for name, _, _ in bad_images()]
)
def test_bad_bytes_cost_one_row_with_the_right_reason(name, data, reason):
    assert reason_for(data) == reason


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_an_image_cut_anywhere_never_raises_anything_but_a_row_error(name):
    data = encode(photograph("chelsea", (60, 40)), name)
    expected = (None, Reason.DECODE_ERROR, Reason.NOT_AN_IMAGE, Reason.EMPTY_FILE)
    for end in random.Random(0).sample(range(len(data) - 1), 60):
        assert reason_if_any(data[:end]) in expected


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_garbled_images_never_raise_anything_but_a_row_error(name):
    rng = random.Random(1)
    data = encode(photograph("chelsea", (60, 40)), name)
    limits = DecodeLimits(max_pixels=1_000_000)
    for _ in range(60):
        garbled = bytearray(data)
        for _ in range(rng.randrange(1, 10)):
            garbled[rng.randrange(len(data))] = rng.randrange(256)
        expected = (None, Reason.DECODE_ERROR, Reason.NOT_AN_IMAGE, Reason.TOO_MANY_PIXELS)
        assert reason_if_any(bytes(garbled), limits=limits) in expected


def test_an_image_at_the_pixel_limit_passes_and_one_beyond_does_not():
    data = encode(photograph("chelsea", (40, 25)), "PNG")
    assert prepare(data, limits=DecodeLimits(max_pixels=1000)).width == 40
    assert reason_for(data, limits=DecodeLimits(max_pixels=999)) == Reason.TOO_MANY_PIXELS


def test_too_many_bytes_are_refused_before_they_are_looked_at():
    data = encode(photograph("chelsea", (40, 25)), "PNG")
    assert prepare(data, limits=DecodeLimits(max_bytes=len(data)))
    limits = DecodeLimits(max_bytes=len(data) - 1)
    assert reason_for(data, limits=limits) == Reason.TOO_MANY_BYTES


def test_max_pixels_beyond_pillows_own_limit_is_honoured_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(photograph("chelsea", (40, 25)), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(data).width == 40
    assert Image.MAX_IMAGE_PIXELS == 100


def test_pillows_own_refusal_is_too_many_pixels_and_not_a_damaged_file(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(photograph("chelsea", (40, 25)), "TIFF")
    assert reason_for(data) == Reason.TOO_MANY_PIXELS


def test_an_image_that_takes_too_long_is_stopped_in_the_middle_in_any_thread(monkeypatch):
    """The clock ticks a second at each look: the decoder is stopped at its third read."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    data = encode(page(1, (1200, 1600)), "PNG")
    found = []
    thread = threading.Thread(
        target=lambda: found.append(reason_for(data, limits=DecodeLimits(seconds=2.5)))
    )
    thread.start()
    thread.join()
    assert found == [Reason.TIMEOUT]
    assert next(ticks) <= 5


def test_a_huge_image_costs_no_memory():
    """In a process of its own, so that the peak is that of this one image."""
    program = """
import resource
from tests.images import RELEASED_PINPOINTS, bad_images
from model.inputs.images import prepare_image
from schemas.errors import RowError
huge = [data for name, data, _ in bad_images() if name.startswith("huge")]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in huge:
    try:
        prepare_image(data, RELEASED_PINPOINTS)
    except RowError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    assert int(result.stdout) < 20 * 1024  # KiB; decoding the PNG alone would take 858 MiB


def test_transparency_is_laid_on_white_so_that_hidden_colours_stay_hidden():
    black = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
    prepared = prepare(encode(black, "PNG"))
    assert (prepared.tiles[0] == 255).all()
    assert prepared.note == "transparency laid on white"


def test_an_opaque_alpha_channel_changes_nothing():
    photo = photograph("chelsea", (90, 60))
    opaque = photo.copy()
    opaque.putalpha(255)
    prepared = prepare(encode(opaque, "PNG"))
    np.testing.assert_array_equal(prepared.tiles, slow_tiles(photo))
    assert prepared.note == ""


def test_a_see_through_palette_colour_becomes_white():
    half = Image.new("P", (100, 100), 0)
    half.putpalette([0, 0, 0, 200, 0, 0])
    half.paste(1, (0, 0, 100, 50))
    prepared = prepare(encode(half, "GIF", transparency=0))
    assert prepared.tiles[0, 300, 100].tolist() == [255, 255, 255]
    assert prepared.tiles[0, 30, 100].tolist() == [200, 0, 0]


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped_to_white(name):
    values = sixteen_bits()
    expected = Image.fromarray((values // 256).astype(np.uint8))
    prepared = prepare(encode(Image.fromarray(values), name))
    np.testing.assert_array_equal(prepared.tiles, slow_tiles(expected))
    assert prepared.note == "16-bit grey reduced to 8 bits"


def test_an_animation_is_its_first_frame_and_says_so():
    red, blue = Image.new("RGB", (30, 30), "red"), Image.new("RGB", (30, 30), "blue")
    for name in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encode(red, name, save_all=True, append_images=[blue])
        prepared = prepare(data)
        assert prepared.tiles[0, 100, 100, 0] > 250, name
        assert prepared.tiles[0, 100, 100, 2] < 5, name
        assert prepared.note == "first frame of several", name


@pytest.mark.parametrize("value", [1, 3, 6, 8])
def test_exif_rotation_is_off_by_default_and_noted_when_on(value):
    photo = photograph("chelsea", (90, 60))
    data = encode(photo, "PNG", exif=orientation(value))
    assert (prepare(data).width, prepare(data).note) == (90, "")
    turned = prepare(data, exif_rotate=True)
    upright = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}
    transpose = upright.get(value, Image.Transpose.ROTATE_90)
    expected = photo if transpose is None else photo.transpose(transpose)
    np.testing.assert_array_equal(turned.tiles, slow_tiles(expected))
    assert (turned.width, turned.height) == expected.size
    assert turned.note == ("" if value == 1 else f"turned upright from EXIF orientation {value}")


@pytest.mark.parametrize("value", range(2, 9))
def test_another_tag_that_is_damaged_does_not_keep_a_photograph_from_being_turned(value):
    photo = photograph("chelsea", (90, 60))
    turned = prepare(encode(photo, "PNG", exif=damaged_exif(value)), exif_rotate=True)
    photo.getexif()[0x0112] = value
    np.testing.assert_array_equal(turned.tiles, slow_tiles(ImageOps.exif_transpose(photo)))


@pytest.mark.parametrize(("bits", "white"), [(8, 0), (8, 1), (12, 1), (16, 0), (16, 1)])
def test_grey_is_as_light_as_a_tiff_means_it(bits, white):
    thumbnail = prepare(grey_tiff(bits, white)).tiles[0]
    assert {int(level) for level in np.unique(thumbnail)} <= {191, 192}


def test_the_inputs_need_neither_torch_nor_transformers():
    program = (
        "import sys, model.inputs.images, model.inputs.prompt, model.inputs.tiling;"
        "assert not {'torch', 'transformers', 'ray', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
