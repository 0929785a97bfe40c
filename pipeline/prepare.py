"""The prepare stage: INPUT rows to PREPARED rows, encoded images to tiles and token ids.

Runs in CPU actors; knows the model's pixels and prompt, but neither its weights nor torch.
"""

import hashlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from model.inputs.images import DecodeLimits, Tiles, prepare_image
from model.inputs.prompt import PromptTemplate
from model.inputs.tiling import Pinpoints
from pipeline.guard import guard
from pipeline.render.renderer import Renderer
from pipeline.render.settings import PageSettings
from pipeline.tables import add_columns
from schemas.errors import Reason, RowError
from schemas.rows import PREPARED, with_kept

# Tiles that leave a worker together: five photographs or a page. A replica answers a block as a
# whole, so in larger ones the first rows wait for the last (and Ray spills to disk sooner).
BLOCK_BYTES = 8 * 1024**2


@dataclass(frozen=True)
class PrepareSettings:
    """All a CPU worker needs to know of the job and the checkpoint.

    trial: what decoding an image may cost where it is tried out first. hang_seconds: how long a
    worker may give no sign of life, beside the time that an image may take.
    """

    template: PromptTemplate
    pinpoints: Pinpoints
    tile: int
    patch: int
    limits: DecodeLimits
    exif_rotate: bool
    kept: pa.Schema
    skip_blank: bool = False
    trial: PageSettings = field(default_factory=PageSettings)
    hang_seconds: float = 45.0


class Prepare:
    """Turns tables of INPUT rows into tables of PREPARED rows, one row for each, in order.

    A worker that is stopped, or whose decoder does not return, is killed, and Ray starts it again:
    nobody else would notice. One that was started again may have died of an image, and is given the
    same batch: it tries out each image in a child process first, and the one that the child dies
    of, or is late with, is a failed row. That doubles the cost of decoding, for this worker.
    """

    def __init__(self, settings: PrepareSettings) -> None:
        self.settings = settings
        self.schema = with_kept(PREPARED, settings.kept)
        # Pillow warns of damaged metadata; what matters of it is in the row's message.
        warnings.filterwarnings("ignore", module="PIL")
        self._trial = Renderer(settings.trial) if _was_started_again() else None
        self._began: float | None = None  # with the image at hand
        guard(settings.limits.seconds + settings.hang_seconds, self._in_time)

    def __call__(self, inputs: pa.Table) -> Iterator[pa.Table]:
        first, rows, held = 0, [], 0
        for data, reason, message in zip(
            inputs["data"], inputs["reason"].to_pylist(), inputs["message"].to_pylist(), strict=True
        ):
            failed = {"reason": reason, "message": message} if reason is not None else None
            self._began = time.monotonic()
            rows.append(failed or self._prepare(data.as_buffer()))
            self._began = None
            held += rows[-1].get("pixels", _NO_PIXELS).size
            if held >= BLOCK_BYTES:
                yield self._table(inputs.slice(first, len(rows)), rows)
                first, rows, held = first + len(rows), [], 0
        if rows:
            yield self._table(inputs.slice(first), rows)

    def _in_time(self) -> bool:
        """Whether no decoder is late by itself; one that was tried out has returned before."""
        began = self._began
        late = began is not None and time.monotonic() - began > self.settings.limits.seconds
        return self._trial is not None or not late

    def _prepare(self, image: pa.Buffer) -> dict[str, Any]:
        """The columns this stage writes, of one row."""
        started = time.perf_counter()
        columns: dict[str, Any] = {"image_sha256": hashlib.sha256(image).hexdigest()}
        try:
            if self._trial:
                self._trial.decode(memoryview(image))
            prepared = prepare_image(
                image,
                self.settings.pinpoints,
                self.settings.tile,
                self.settings.limits,
                self.settings.exif_rotate,
                self.settings.patch,
                self.settings.skip_blank,
            )
        except RowError as error:
            columns |= {"reason": error.reason, "message": error.message}
        else:
            columns |= {
                "message": prepared.note or None,
                "width": prepared.width,
                "height": prepared.height,
            }
            columns |= {"reason": Reason.BLANK} if prepared.blank else self._asked(prepared)
        return columns | {"prepare_seconds": time.perf_counter() - started}

    def _asked(self, prepared: Tiles) -> dict[str, Any]:
        """What the model is asked about an image."""
        return {
            "tiles": prepared.layout.tiles,
            "image_tokens": prepared.layout.tokens,
            "token_ids": self.settings.template.fill(prepared.layout.tokens),
            "pixels": prepared.tiles.reshape(-1),
        }

    def _table(self, inputs: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
        small = pa.schema([column for column in self.schema if column.name != "pixels"])
        pixels = [row.get("pixels", _NO_PIXELS) for row in rows]
        offsets = np.cumsum([0, *(tiles.size for tiles in pixels)])
        flat = pa.LargeListArray.from_arrays(offsets, np.concatenate(pixels))
        table = add_columns(inputs, rows, small).append_column("pixels", flat)
        return table.select(self.schema.names).cast(self.schema)


def _was_started_again() -> bool:
    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


_NO_PIXELS = np.empty(0, np.uint8)
