"""`vl01 quantize`: what is typed, how far it is, what it says at its end."""

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from jobs.config import absolute_address
from jobs.flags import Debug, EndpointUrl
from jobs.show import quantized
from pipeline.progress import Progress, clock
from schemas.errors import StoppedError

if TYPE_CHECKING:
    from model.weights.convert import Quantized

HELP = """Make an int8 checkpoint of a bf16 one, for faster loads.

Reads every tensor of SRC once, a piece at a time, and writes half its bytes
to DST. The shards of DST follow the layers, so that each rank reads only
files of its own, and its index holds checksums, which every load compares.

A run with DST computes what a run with SRC and --quantization int8 computes,
bit for bit; either may resume what the other began. Stopped, the same
command goes on after the last whole shard.

SRC and DST are folders or fsspec addresses, such as s3://bucket/folder.
The released checkpoint becomes 459 GB.

[bold]Examples[/bold]
  vl01 quantize /models/vl01 /models/vl01-int8
  vl01 quantize s3://models/vl01 s3://models/vl01-int8 --workers 16
  vl01 quantize /models/vl01 /models/vl01-int8 --verify

[bold]Exit codes[/bold]
  0  DST is whole
  1  stopped before the end; the same command goes on
  2  SRC cannot be quantized, or DST not be used: the message says why"""


def quantize(
    source: Annotated[str, typer.Argument(help="the bf16 checkpoint", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="where the int8 one is written", metavar="DST")],
    verify: Annotated[
        bool, typer.Option("--verify", help="read DST back, and compare it", metavar="")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(help="shards at a time; default: the cores, 16 at most", metavar="N", min=1),
    ] = None,
    endpoint_url: EndpointUrl = None,
    _debug: Debug = False,
) -> None:
    from model.files import Folder
    from model.weights.convert import Quantizer

    addresses = [absolute_address(address, Path.cwd()) for address in (source, target)]
    quantizer = Quantizer(*(Folder(address, endpoint_url) for address in addresses))
    started = time.monotonic()
    workers = workers or min(16, len(os.sched_getaffinity(0)))
    try:
        with BytesProgress("quantizing", quantizer.left) as progress:
            done = quantizer.run(workers, progress.add)
    except KeyboardInterrupt:
        raise StoppedError("stopped. What is done stays; the same command goes on.") from None
    said = {"output": addresses[1], "shards": _shards(done)}
    if done.bytes_read:
        said["read"] = _pace(done.bytes_read, time.monotonic() - started)
        said["written"] = f"{done.bytes_written / 1e9:,.2f} GB"
    if verify:
        started = time.monotonic()
        with BytesProgress("reading back", quantizer.nbytes) as progress:
            size = quantizer.read_back(progress.add)
        said["verified"] = _pace(size, time.monotonic() - started)
    quantized(said)


def _shards(done: "Quantized") -> str:
    kept = f", {done.shards_kept:,} of them were there already" if done.shards_kept else ""
    return f"{done.shards:,}{kept}"


def _pace(size: int, seconds: float) -> str:
    return f"{size / 1e9:,.2f} GB in {seconds:,.1f} s, {size / 1e9 / seconds:,.2f} GB/s"


class BytesProgress(Progress):
    """The same line for bytes: how many, how fast, how long still. `add` may come from threads."""

    def __init__(self, phase: str, total: int, console: Console | None = None) -> None:
        super().__init__(console)
        self.phase = phase
        self._total, self._bytes, self._begun = total, 0, time.monotonic()
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._bytes += size

    def has_results(self) -> bool:
        return self._bytes > 0

    def line(self) -> Text:
        seconds = time.monotonic() - self._begun
        parts = [
            f"[{clock(seconds)}]",
            f"{self.phase} {self._bytes / 1e9:,.2f} of {self._total / 1e9:,.2f} GB",
            f"{self._bytes / 1e9 / max(seconds, 1e-3):,.2f} GB/s",
        ]
        if self._bytes:
            left = (self._total - self._bytes) * seconds / self._bytes
            parts.append(f"about {clock(left)} left")
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
