"""The network as it is used: images on a disk, `vl01 caption --random-weights`, Parquet, verified.

`python -m tests.gpu.bench_whole --pp 4 --photos 256 --json FILE`: all 80 layers on four GPUs.
Prints what the run says, then images a second with the model loaded, how busy each rank was, the
most memory of each GPU and how long it did nothing. `--kill-after 30` kills a rank half a minute
after the first commit. `--pp 1 --layers 20` is what one of four ranks can do alone; `--pp 2
--replicas 2 --layers 40 --kill-after 30` shows whether one replica waits for another.

`--width tiny --layers 4 --device cpu --photos 40 --new 8 --pp 2` tries it anywhere.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.dataset as ds
from PIL import Image

from jobs.bench.slice import WIDTHS
from model.nano.random_checkpoint import write_configuration
from tests.images import page

PHOTO, PAGE = (640, 480), (1654, 2339)  # pixels, width and height
RANK, REPLICA = "model.engine.rank_worker", "MapBatches(Generate)"  # as processes are called
IDLE = 5  # percent: a GPU that is used less does nothing
_GPUS = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Look:
    """The state of a run at a moment. gpus: MiB in use, and percent of the last second at work."""

    seconds: float
    commits: int
    gpus: tuple[tuple[int, int], ...]


class Watch(threading.Thread):
    """Looks at a run each second until it has ended, and kills a rank of it if it is to."""

    def __init__(self, run: subprocess.Popen, output: Path, kill_after: float | None) -> None:
        super().__init__(daemon=True)
        self._run, self._output, self._kill_after = run, output, kill_after
        self.looks: list[Look] = []
        self.killed_at: float | None = None

    def run(self) -> None:
        while self._run.poll() is None:
            self.looks.append(look(self._output))
            if self._kill_after is not None and self.killed_at is None:
                self._kill_in_time(self._kill_after)
            time.sleep(1)

    def _kill_in_time(self, after: float) -> None:
        working = [each.seconds for each in self.looks if each.commits]
        if not working or time.monotonic() < working[0] + after:
            return
        below = psutil.Process(self._run.pid).children(recursive=True)
        ranks = [each for each in below if RANK in command_of(each)]
        victim = (ranks or [each for each in below if REPLICA in command_of(each)])[-1]
        print(f"killing {command_of(victim)}", flush=True)
        os.kill(victim.pid, signal.SIGKILL)
        self.killed_at = time.monotonic()

    def pauses(self) -> dict[str, Any]:
        """Seconds between two commits at most, and in which a GPU did nothing at a stretch, from
        the first commit to the last."""
        last = max((each.commits for each in self.looks), default=0)
        working = [each for each in self.looks if 0 < each.commits < last]
        pairs = list(pairwise(self.looks))
        commits = [now.seconds for before, now in pairs if now.commits > before.commits]
        gpus = range(min((len(each.gpus) for each in working), default=0))
        return {
            "between_commits": max((b - a for a, b in pairwise(commits)), default=0.0),
            "of_gpus": [longest([each.gpus[gpu][1] < IDLE for each in working]) for gpu in gpus],
        }

    def most_memory(self) -> list[float]:
        """GiB of each GPU."""
        gpus = range(min((len(each.gpus) for each in self.looks), default=0))
        return [max(each.gpus[gpu][0] for each in self.looks) / 1024 for gpu in gpus]


def look(output: Path) -> Look:
    try:
        shown = subprocess.run(_GPUS, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no GPUs here
        shown = ""
    pairs = (line.split(",") for line in shown.splitlines())
    gpus = tuple((int(used), int(busy)) for used, busy in pairs)
    return Look(time.monotonic(), len(list(output.glob("_vl01/commits/*.json"))), gpus)


def longest(idle: Sequence[bool]) -> int:
    """How many are true in a row, at most."""
    found = now = 0
    for each in idle:
        now = now + 1 if each else 0
        found = max(found, now)
    return found


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def write_images(folder: Path, photos: int, pages: int) -> None:
    """Each another one: identical images would be answered once."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(photos):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        coarse.resize(PHOTO, Image.Resampling.BICUBIC).save(folder / f"photo-{n:06}.jpg")
    for n in range(pages):
        page(n, PAGE).save(folder / f"page-{n:06}.png")


def vl01(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "jobs", *map(str, arguments)]


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs it, and fails if a row is missing or there twice."""
    source, output, model = folder / "source", folder / "out", folder / "model"
    write_images(source, given.photos, given.pages)
    write_configuration(model, replace(WIDTHS[given.width], layers=given.layers), endless=True)
    run = subprocess.Popen(
        vl01("caption", source, "--output", output, "--model", model, "--random-weights",
             "--pp", given.pp, "--replicas", given.replicas, "--device", given.device,
             "--quantization", given.quantization, "--max-new-tokens", given.new,
             "--unit-rows", given.unit_rows)
    )  # fmt: skip
    watch = Watch(run, output, given.kill_after)
    watch.start()
    if run.wait():
        raise SystemExit(f"the run exited with {run.returncode}")
    watch.join()
    subprocess.run(vl01("verify", output, "--deep"), check=True)
    if given.kill_after is not None and watch.killed_at is None:
        raise SystemExit("the run ended before a rank was to be killed: give it more images")
    (record,) = (json.loads(path.read_text()) for path in output.glob("_vl01/runs/*.json"))
    rows = ds.dataset(output, format="parquet").count_rows()
    assert rows == given.photos + given.pages, "vl01 verify must have seen this"
    return {
        "images": rows,
        "images_per_second": rows / record["loaded_seconds"],
        "tokens_per_second": {
            kind: record[f"{kind}_tokens"] / record["loaded_seconds"]
            for kind in ("prompt", "output")
        },
        "most_gib": watch.most_memory(),
        "pauses": watch.pauses(),
        "run": record,
        "looks": [asdict(each) for each in watch.looks],
    }


def show(numbers: dict[str, Any]) -> None:
    run, pauses, tokens = numbers["run"], numbers["pauses"], numbers["tokens_per_second"]
    busy = ", ".join(f"{share:.1%}" for share in run["rank_busy"])
    print(
        f"{numbers['images']} images in {run['seconds']:.1f} s; with the model loaded, in "
        f"{run['loaded_seconds']:.1f} s: {numbers['images_per_second']:.2f} images/s, "
        f"{tokens['prompt']:,.0f} prompt and {tokens['output']:,.0f} output tokens/s\n"
        f"ranks busy {busy}; restarts of replicas: {run['restarts']}\n"
        f"between two commits {pauses['between_commits']:.1f} s at most"
    )
    for gpu, (most, idle) in enumerate(zip(numbers["most_gib"], pauses["of_gpus"], strict=False)):
        print(f"GPU {gpu}: {most:.1f} GiB at most, {idle} s without work at most")


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=0, help="of 640x480 pixels")
    parser.add_argument("--pages", type=int, default=0, help="of 1654x2339 pixels")
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--width", choices=list(WIDTHS), default="released")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--unit-rows", type=int, default=8, help="rows committed together")
    parser.add_argument("--kill-after", type=float, help="seconds after the first commit")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> None:
    given = arguments(line)
    with tempfile.TemporaryDirectory(prefix="vl01-whole-") as folder:
        numbers = measure(given, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(numbers, indent=1))
    show(numbers)


if __name__ == "__main__":
    main()
