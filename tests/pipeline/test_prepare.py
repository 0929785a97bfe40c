import hashlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from model.inputs.images import DecodeLimits, prepare_image
from model.inputs.prompt import PromptTemplate
from pipeline import prepare
from pipeline.prepare import Prepare, PrepareSettings
from schemas.errors import Reason
from schemas.rows import INPUT, PREPARED, with_kept
from tests.images import bad_images, encode, good_images

KEPT = pa.schema([("price", pa.decimal128(9, 2)), ("seen", pa.timestamp("ns"))])
SETTINGS = PrepareSettings(
    template=PromptTemplate((1, 2), (3,), 9),
    pinpoints=((56, 56), (112, 56), (56, 112), (112, 112)),
    tile=56,
    patch=14,
    limits=DecodeLimits(max_pixels=100_000_000, seconds=30),
    exif_rotate=False,
    kept=KEPT,
)


def inputs(images: list[bytes | None], reason: str | None = None) -> pa.Table:
    rows = [
        {
            "row_id": f"row {i}",
            "unit": 3,
            "index": i,
            "source": "a.tar",
            "data": data,
            "read_seconds": 0.25,
            "reason": reason,
            "price": None,
            "seen": 1_700_000_000_000_000_001 + i,
        }
        for i, data in enumerate(images)
    ]
    return pa.Table.from_pylist(rows, schema=with_kept(INPUT, KEPT))


def run(table: pa.Table) -> pa.Table:
    return pa.concat_tables(Prepare(SETTINGS)(table))


def test_tiles_and_prompt_are_those_of_the_image():
    images = [data for _, data in good_images(3)]
    table = run(inputs(list(images)))
    assert table.schema.equals(with_kept(PREPARED, KEPT))
    for data, row in zip(images, table.to_pylist(), strict=True):
        expected = prepare_image(data, SETTINGS.pinpoints, 56)
        tiles = np.asarray(row["pixels"], np.uint8).reshape(-1, 56, 56, 3)
        assert np.array_equal(tiles, expected.tiles)
        assert row["tiles"] == len(tiles)
        assert row["token_ids"].count(9) == row["image_tokens"] == expected.layout.tokens
        assert row["image_sha256"] == hashlib.sha256(data).hexdigest()


def test_every_bad_image_costs_its_own_row_and_no_other():
    bad = bad_images()
    good = good_images(1)[0][1]
    table = run(inputs([good, *(data for _, data, _ in bad), good]))
    reasons = table["reason"].to_pylist()
    assert reasons == [None, *(reason for _, _, reason in bad), None]
    assert all(message for message in table["message"].to_pylist()[1:-1])


def test_a_row_that_could_not_be_read_keeps_its_reason():
    table = run(inputs([None], reason=Reason.NOT_FOUND))
    assert table["reason"].to_pylist() == ["not_found"]
    assert table["image_sha256"].to_pylist() == [None]


def test_kept_columns_pass_through_bit_equal():
    table = run(inputs([good_images(1)[0][1]] * 3))
    assert table["seen"].cast(pa.int64()).to_pylist() == [
        1_700_000_000_000_000_001 + i for i in range(3)
    ]


@pytest.mark.parametrize("block_bytes", [1, 40_000, 10**9])
def test_rows_keep_their_order_however_they_are_cut_into_blocks(monkeypatch, block_bytes):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", block_bytes)
    images = [data for _, data in good_images(5)]
    tables = list(Prepare(SETTINGS)(inputs(list(images))))
    rows = pa.concat_tables(tables)["row_id"].to_pylist()
    assert rows == [f"row {i}" for i in range(5)]
    assert (len(tables) == 5) == (block_bytes == 1)


def test_a_blank_page_keeps_its_size_and_asks_the_model_nothing():
    images = [encode(Image.new("RGB", (300, 400), "white"), "PNG"), good_images(1)[0][1]]
    settings = replace(SETTINGS, skip_blank=True)
    table = pa.concat_tables(Prepare(settings)(inputs(list(images))))
    assert table["reason"].to_pylist() == ["blank", None]
    blank = table.to_pylist()[0]
    assert (blank["width"], blank["height"]) == (300, 400)
    assert (blank["tiles"], blank["token_ids"], blank["pixels"]) == (None, None, [])
    assert run(inputs(list(images)))["reason"].to_pylist() == [None, None]
