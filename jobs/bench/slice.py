"""Times the real engine on workloads of made-up tokens, over random weights. Prints nothing."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from jobs.bench.ceilings import Ceilings, measure_ceilings, synchronize
from jobs.bench.families import seconds_by_family
from jobs.bench.workloads import Workload, flops, step_bytes
from model.config import VL01Config, load_config
from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.layers.dispatch import plain_layers
from model.nano.random_checkpoint import RELEASED_SIZES, NanoSizes, write_configuration
from schemas.errors import ConfigError

# "tiny" runs anywhere in seconds: to try the command, not to measure.
WIDTHS = {"released": RELEASED_SIZES, "tiny": NanoSizes(vocab_size=640, intermediate_size=96)}


@dataclass(frozen=True)
class SliceSettings:
    """A slice of `layers` layers, all on one device, and how it is run."""

    layers: int = 8
    width: str = "released"
    device: str = "auto"
    quantization: str = "int8"
    chunk_tokens: int = 16384
    repeat: int = 3
    plain: bool = False  # without the kernels
    profile: bool = True


@dataclass(frozen=True)
class Measurement:
    """One workload. seconds: the best run, `runs` all of them. flops, bytes: what the workload
    needs in all; bytes only of workloads that are mostly decode. families: seconds of one
    profiled run by family of kernels; longest: its kernels that take longest."""

    workload: Workload
    seconds: float
    runs: tuple[float, ...]
    microbatches: int
    flops: float
    bytes: float | None
    peak_bytes: int
    families: dict[str, float] = field(default_factory=dict)
    longest: tuple[str, ...] = ()

    @property
    def requests_per_second(self) -> float:
        return self.workload.requests / self.seconds

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.workload.requests * self.workload.prompt / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        return self.workload.requests * self.workload.new / self.seconds

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds

    @property
    def bytes_per_second(self) -> float | None:
        return self.bytes and self.bytes / self.seconds


class Slice:
    """An engine over a slice, ready to be measured; `ceilings` are those of its device.

    Raises ConfigError when there is no GPU for the released width, or not enough memory.
    """

    def __init__(self, settings: SliceSettings, folder: Path) -> None:
        sizes = replace(WIDTHS[settings.width], layers=settings.layers)
        write_configuration(folder, sizes, endless=True)
        self._config = EngineConfig(
            str(folder),
            device=settings.device,  # type: ignore[arg-type]
            quantization=settings.quantization,  # type: ignore[arg-type]
            chunk_tokens=settings.chunk_tokens,
            random_weights=True,
        )
        if settings.width == "released" and not self._config.on_cuda:
            raise ConfigError(
                "a slice at the released width takes a GPU with 80 GB, and this machine has none; "
                "--width tiny tries the command on a CPU"
            )
        self._config.check_devices()
        self._settings = settings
        self.model: VL01Config = load_config(folder)
        self.device = self._config.rank_device(0)
        self.ceilings: Ceilings = measure_ceilings(self.device)
        self.engine = Engine(self._config)

    def measure(self, workload: Workload) -> Measurement:
        """The best of `repeat` runs after one to warm up."""
        self._run(workload)
        before = self.engine.statistics.microbatches
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        runs = tuple(self._run(workload) for _ in range(self._settings.repeat))
        measurement = Measurement(
            workload,
            seconds=min(runs),
            runs=runs,
            microbatches=(self.engine.statistics.microbatches - before) // len(runs),
            flops=flops(self.model.text, workload),
            bytes=self._bytes(workload),
            peak_bytes=_peak_bytes(self.device),
        )
        if self.device.type == "cuda" and self._settings.profile:
            families, longest = seconds_by_family(lambda: self._run(workload))
            measurement = replace(measurement, families=families, longest=tuple(longest))
        return measurement

    def _run(self, workload: Workload) -> float:
        """Seconds from the first request in to the last answer out."""
        requests = workload.make_requests(self.model)
        synchronize(self.device)
        started = time.perf_counter()
        for request in requests:
            self.engine.add(request)
        results = []
        while self.engine.unfinished:
            results += self.engine.step()
        seconds = time.perf_counter() - started
        assert [len(result.token_ids) for result in results] == [workload.new] * workload.requests
        return seconds

    def _bytes(self, workload: Workload) -> float | None:
        if workload.prompt > workload.new:
            return None
        weight_bytes = 2 if self._config.quantization == "none" else 1
        contexts = range(workload.prompt, workload.prompt + workload.new)
        return sum(
            step_bytes(self.model.text, workload.requests, context, weight_bytes)
            for context in contexts
        )


def released_model() -> VL01Config:
    """The sizes of the whole released network."""
    with tempfile.TemporaryDirectory(prefix="vl01-bench-") as folder:
        write_configuration(Path(folder), RELEASED_SIZES)
        return load_config(folder)


@contextmanager
def open_slice(settings: SliceSettings) -> Iterator[Slice]:
    plainly = plain_layers() if settings.plain else nullcontext()
    with tempfile.TemporaryDirectory(prefix="vl01-bench-") as folder, plainly:
        opened = Slice(settings, Path(folder))
        with opened.engine:
            yield opened


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
