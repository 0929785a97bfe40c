"""An image that kills its decoder costs its own row, once Ray has started the worker again."""

import os
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data
from PIL import Image
from ray.data import ActorPoolStrategy

from pipeline.placement import configure_ray_data, ray_session
from pipeline.prepare import BLOCK_BYTES, Prepare
from pipeline.render.settings import PageSettings
from tests.images import encode
from tests.pipeline.test_prepare import SETTINGS, inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SIDE = 9000  # of the image that a child of 400 MiB cannot decode


class Fragile(Prepare):
    """Dies of the image that the child dies of too, unless that one was tried out first."""

    def _prepare(self, image: pa.Buffer):
        columns = super()._prepare(image)
        if columns.get("width") == SIDE:
            os._exit(1)
        return columns


def test_an_image_that_kills_the_worker_is_a_failed_row_and_the_others_are_prepared():
    small = [encode(Image.new("RGB", (30 + i, 20)), "PNG") for i in range(11)]
    deadly = encode(Image.new("RGB", (SIDE, SIDE)), "PNG")
    table = inputs([*small[:5], deadly, *small[5:]])
    settings = SETTINGS.__class__(
        **{**vars(SETTINGS), "trial": PageSettings(memory_bytes=400 * 1024**2)}
    )
    with ray_session("local"):
        configure_ray_data(BLOCK_BYTES)
        prepared = ray.data.from_arrow(table).map_batches(
            Fragile,
            fn_constructor_args=(settings,),
            batch_size=4,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1),
            num_cpus=1,
            max_task_retries=5,
        )
        tables: Any = prepared.iter_batches(batch_format="pyarrow")
        rows = [row for table in tables for row in table.to_pylist()]
    assert {row["row_id"]: row["reason"] for row in rows} == {
        f"row {i}": "crash" if i == 5 else None for i in range(12)
    }
    assert len(rows) == 12
