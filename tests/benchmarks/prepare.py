"""Images a second of the prepare step on one core, against the least it has to do and transformers.

`bare` is the Pillow calls no implementation can avoid: decode, resize to fit, resize to thumbnail.
Run with `python -m tests.benchmarks.prepare`.
"""

import argparse
import io
import os
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from model.inputs.images import prepare_image
from model.inputs.tiling import choose_layout, fitted_size
from tests.images import RELEASED_PINPOINTS, page, photograph

TILE = 336


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ours(data: bytes) -> None:
    prepare_image(data, RELEASED_PINPOINTS, TILE)


def bare(data: bytes) -> None:
    image = Image.open(io.BytesIO(data))
    image.load()
    layout = choose_layout(image.width, image.height, RELEASED_PINPOINTS, TILE)
    grid = (layout.columns * TILE, layout.rows * TILE)
    image.resize(fitted_size(*image.size, *grid), Image.Resampling.BICUBIC)
    image.resize((TILE, TILE), Image.Resampling.BICUBIC)


def transformers_pil() -> Callable[[bytes], None]:
    side = {"height": TILE, "width": TILE}
    processor = LlavaNextImageProcessorPil(
        size=side, crop_size=side, image_grid_pinpoints=[[h, w] for w, h in RELEASED_PINPOINTS]
    )

    def prepare(data: bytes) -> None:
        processor(Image.open(io.BytesIO(data)), return_tensors="np")

    return prepare


def seconds(prepare: Callable[[bytes], None], data: bytes) -> float:
    """Wall time of the second of two calls: the first leaves memory and caches as it likes them."""
    prepare(data)
    started = time.perf_counter()
    prepare(data)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ways = {"ours": ours, "bare Pillow": bare, "transformers": transformers_pil()}
    images = {"640x480": photograph("china", (640, 480)), "1654x2339": page(0, (1654, 2339))}
    print(f"{'JPEG':<11}{'way':<15}{'ms (median)':>12}{'images/s':>10}{'time / bare':>13}")
    for size, image in images.items():
        data = jpeg(image)
        # The ways take turns, so that a change of the machine's load falls on all of them.
        times = [[seconds(way, data) for way in ways.values()] for _ in range(rounds)]
        medians = dict(zip(ways, np.median(times, axis=0), strict=True))
        for way, median in medians.items():
            ratio = median / medians["bare Pillow"]
            print(f"{size:<11}{way:<15}{median * 1e3:>12.1f}{1 / median:>10.1f}{ratio:>13.2f}")


if __name__ == "__main__":
    main()
