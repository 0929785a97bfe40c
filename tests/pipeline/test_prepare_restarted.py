"""An image that kills its decoder costs its own row, once Ray has started the worker again; that a
worker is stopped or stuck costs none."""

import os
import signal
import time
from dataclasses import replace
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


class Stopped(Prepare):
    """As by SIGSTOP from outside, at its fifth image."""

    images = 0

    def _prepare(self, image: pa.Buffer):
        self.images += 1
        if self.images == 5 and not self._trial:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super()._prepare(image)


class Stuck(Prepare):
    """In a decoder that does not return, but lets other threads run, at its fifth image."""

    images = 0

    def _prepare(self, image: pa.Buffer):
        self.images += 1
        if self.images == 5 and not self._trial:
            time.sleep(3600)
        return super()._prepare(image)


def reasons(worker: type[Prepare], table: pa.Table, **settings: Any) -> list[tuple[str, str]]:
    """(row, reason) of what a worker and those after it make of a table."""
    with ray_session("local"):
        configure_ray_data(BLOCK_BYTES)
        prepared = ray.data.from_arrow(table).map_batches(
            worker,
            fn_constructor_args=(replace(SETTINGS, **settings),),
            batch_size=4,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1),
            num_cpus=1,
            max_task_retries=5,
        )
        tables: Any = prepared.iter_batches(batch_format="pyarrow")
        rows = [row for table in tables for row in table.to_pylist()]
    return sorted((row["row_id"], row["reason"]) for row in rows)


def test_an_image_that_kills_the_worker_is_a_failed_row_and_the_others_are_prepared():
    small = [encode(Image.new("RGB", (30 + i, 20)), "PNG") for i in range(11)]
    deadly = encode(Image.new("RGB", (SIDE, SIDE)), "PNG")
    table = inputs([*small[:5], deadly, *small[5:]])
    found = reasons(Fragile, table, trial=PageSettings(memory_bytes=400 * 1024**2))
    assert found == sorted((f"row {i}", "crash" if i == 5 else None) for i in range(12))


@pytest.mark.parametrize("worker", [Stopped, Stuck])
def test_a_worker_that_is_stopped_or_stuck_is_replaced_and_every_row_is_prepared_once(worker):
    table = inputs([encode(Image.new("RGB", (30 + i, 20)), "PNG") for i in range(12)])
    limits = replace(SETTINGS.limits, seconds=2.0)
    found = reasons(worker, table, limits=limits, hang_seconds=2.0)
    assert found == sorted((f"row {i}", None) for i in range(12))
