"""A size taken from a header is the size that is tiled, and costs no decoding."""

import io

import pytest

from model.inputs.images import DecodeLimits, image_size, prepare_image
from schemas.errors import Reason, RowError
from tests.images import (
    RELEASED_PINPOINTS,
    bad_images,
    encode,
    good_images,
    odd_images,
    orientation,
    photograph,
)

# What is damaged beyond the header is found only by decoding.
TOLD_BY_HEADERS = (Reason.EMPTY_FILE, Reason.NOT_AN_IMAGE, Reason.TOO_MANY_PIXELS)


@pytest.mark.parametrize("exif_rotate", [False, True])
def test_the_size_in_a_header_is_the_size_that_is_tiled(exif_rotate):
    turned = [
        (
            f"{value}.{format}",
            encode(photograph("coins", (90, 60)), format, exif=orientation(value)),
        )
        for value in range(1, 9)
        for format in ("JPEG", "PNG", "WEBP", "TIFF")
    ]
    for name, data in good_images(12) + odd_images() + turned:
        tiled = prepare_image(data, RELEASED_PINPOINTS, exif_rotate=exif_rotate)
        size = image_size(io.BytesIO(data), exif_rotate=exif_rotate)
        assert size == (tiled.width, tiled.height), name


def test_what_a_header_tells_to_be_unusable_has_the_reason_of_a_run():
    for name, data, reason in bad_images():
        if reason in TOLD_BY_HEADERS:
            with pytest.raises(RowError) as raised:
                image_size(io.BytesIO(data), DecodeLimits())
            assert raised.value.reason == reason, name


def test_a_photographs_header_is_read_without_the_rest():
    data = encode(photograph("china"), "JPEG") + bytes(10_000_000)
    file = io.BytesIO(data)
    image_size(file)
    assert file.tell() < 100_000
