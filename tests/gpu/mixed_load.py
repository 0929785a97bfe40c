"""Keeps an engine full of mixed requests, and watches its speed and its memory meanwhile.

Speed is what the cost model foresees of the work done, over the time that it took, so that a change
of the mixture does not look like a change of speed.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch

from model.config import VL01Config
from model.engine.cost import Cost, Work
from model.engine.engine import Engine
from model.engine.microbatch import Image, Microbatch
from model.engine.rank_in_process import RankInProcess
from tests.gpu.mixed_requests import Books, Stream
from tests.model.engine.inside import rank_of

WAITING = 32  # requests besides those in memory: more prompts than one microbatch takes
PATIENCE = 30.0  # seconds that the last answers may be late
WARM_WINDOWS = 2  # in which the engine fills, and kernels are compiled for new shapes

# What the second half may add. The caching allocator keeps what it once needed; the host's heap is
# never quite even.
MOST_RESERVED = 512 << 20
MOST_RSS = 256 << 20


@dataclass(frozen=True)
class Sample:
    """The engine at one moment. seconds: since feeding began; the five after it count since then.
    foreseen: seconds that the cost model gives the work. In bytes: allocated, reserved: of the GPU;
    rss: of the host, less saved, which preempted sequences hold there."""

    seconds: float
    foreseen: float
    microbatches: int
    done: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    running: int
    waiting: int
    allocated: int
    reserved: int
    rss: int
    saved: int


@dataclass(frozen=True)
class Window:
    """What lies between two samples."""

    since: Sample
    until: Sample

    def each_second(self, count: str) -> float:
        seconds = self.until.seconds - self.since.seconds
        return (getattr(self.until, count) - getattr(self.since, count)) / max(1e-9, seconds)

    @property
    def speed(self) -> float:
        """Foreseen seconds of work in a second."""
        return self.each_second("foreseen")

    def line(self) -> str:
        at = self.until
        return (
            f"{at.seconds:4.0f} s  {at.done:,} done  {self.each_second('prompt_tokens'):,.0f} + "
            f"{self.each_second('output_tokens'):,.0f} tokens/s  speed {self.speed:.3g}  "
            f"{at.running} running, {at.waiting} waiting, {at.preemptions} preempted  GPU "
            f"{at.allocated / 2**30:.3f} of {at.reserved / 2**30:.3f} GiB  "
            f"host {at.rss / 2**20:,.0f} MiB + {at.saved / 2**20:,.0f} saved"
        )


@dataclass(frozen=True)
class Trend:
    """Of the windows in which the engine was full. slower: the second half than the first, as a
    share. reserved, rss: bytes that the second half added, by the straight line nearest to it."""

    first_speed: float
    second_speed: float
    reserved: float
    rss: float

    @classmethod
    def of(cls, full: Sequence[Window]) -> "Trend":
        first, second = full[: len(full) // 2], full[len(full) // 2 :]
        return cls(
            Window(first[0].since, first[-1].until).speed,
            Window(second[0].since, second[-1].until).speed,
            _growth(second, "reserved"),
            _growth(second, "rss"),
        )

    @property
    def slower(self) -> float:
        return 1 - self.second_speed / self.first_speed

    def line(self) -> str:
        return (
            f"speed {self.first_speed:.4g}, then {self.second_speed:.4g}: {-self.slower:+.1%}; in "
            f"the second half {self.reserved / 2**20:+,.1f} MiB reserved on the GPU, "
            f"{self.rss / 2**20:+,.1f} MiB of the host"
        )

    def wrong(self, most_slower: float) -> list[str]:
        found = []
        if self.slower > most_slower:
            found.append(f"the second half was {self.slower:.1%} slower than the first")
        if self.reserved > MOST_RESERVED:
            found.append(f"reserved GPU memory grew by {self.reserved / 2**20:,.0f} MiB")
        if self.rss > MOST_RSS:
            found.append(f"the host's memory grew by {self.rss / 2**20:,.0f} MiB")
        return found


def _growth(windows: Sequence[Window], of: str) -> float:
    samples = [windows[0].since, *(window.until for window in windows)]
    seconds = np.array([sample.seconds for sample in samples])
    slope, _ = np.polyfit(seconds - seconds[0], [getattr(s, of) for s in samples], 1)
    return float(slope * (seconds[-1] - seconds[0]))


class Load:
    """Keeps an engine full for `feed` seconds, then lets it finish within about `drain` more."""

    def __init__(
        self,
        engine: Engine,
        model: VL01Config,
        stream: Stream,
        *,
        feed: float,
        drain: float,
        window: float,
    ) -> None:
        self._engine, self._model, self._stream = engine, model, stream
        self._feed, self._drain, self._window = feed, drain, window
        self._cost, self._foreseen = Cost(model), 0.0
        self._asked = 0
        self.books = Books()
        self.windows: list[Window] = []

    @property
    def full(self) -> list[Window]:
        """The windows between the engine's filling and its draining."""
        return [w for w in self.windows if w.until.seconds <= self._feed][WARM_WINDOWS:]

    def run(self) -> None:
        with self._foreseeing():
            self._begin()
            while self._seconds < self._feed:
                self._ask()
                self._step()
            while self._engine.unfinished and self._seconds < self._feed + self._drain + PATIENCE:
                self._step()
            self._look()

    def as_json(self) -> dict[str, Any]:
        samples = [self.windows[0].since, *(window.until for window in self.windows)]
        return {
            "capacity": asdict(self._engine.capacity),
            "requests": self.books.answered,
            "fed_seconds": self._feed,
            "samples": [asdict(sample) for sample in samples],
        }

    def _begin(self) -> None:
        self._started, self._before = time.perf_counter(), self._engine.statistics
        self._last = self._sample()

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _ask(self) -> None:
        engine = self._engine
        while engine.unfinished - engine.occupancy.running < min(WAITING, engine.capacity.slots):
            request = self._stream.next(str(self._asked), self._most_new())
            self._asked += 1
            self.books.ask(request)
            engine.add(request)

    def _step(self) -> None:
        for result in self._engine.step():
            self.books.answer(result)
        if self._seconds >= self._last.seconds + self._window:
            self._look()

    def _most_new(self) -> int:
        """Tokens that an answer which begins now may have, to be there in time."""
        if not self.windows or not self.windows[-1].speed:
            return sys.maxsize
        window, running = self.windows[-1], self._engine.occupancy.running
        alone = Work(running, running, contexts=running * 4096, sampled=running)
        draining = self._cost.seconds(range(self._model.text.num_layers), alone) / window.speed
        steps = (self._feed - self._seconds) * window.each_second("microbatches")
        return max(1, int(steps + 0.7 * self._drain / max(1e-9, draining)))

    @contextmanager
    def _foreseeing(self) -> Iterator[None]:
        submit: Callable = RankInProcess.submit
        layers = range(self._model.text.num_layers)

        def counted(rank: RankInProcess, images: Sequence[Image], microbatch: Microbatch) -> None:
            tiles = sum(len(image.tiles) for image in images)
            work = Work.of(microbatch.plan.segments, tiles)
            self._foreseen += self._cost.seconds(layers, work)
            submit(rank, images, microbatch)

        with mock.patch.object(RankInProcess, "submit", counted):
            yield

    def _look(self) -> None:
        window = Window(self._last, self._sample())
        self._last = window.until
        self.windows.append(window)
        print(window.line(), flush=True)

    def _sample(self) -> Sample:
        statistics, before, running = (
            self._engine.statistics, self._before, self._engine.occupancy.running,
        )  # fmt: skip
        saved = saved_bytes(self._engine)
        return Sample(
            self._seconds,
            self._foreseen,
            statistics.microbatches - before.microbatches,
            self.books.answered,
            statistics.prompt_tokens - before.prompt_tokens,
            statistics.output_tokens - before.output_tokens,
            statistics.preemptions - before.preemptions,
            running,
            self._engine.unfinished - running,
            *gpu_bytes(),
            psutil.Process().memory_info().rss - saved,
            saved,
        )


def gpu_bytes() -> tuple[int, int]:
    """Allocated and reserved."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def saved_bytes(engine: Engine) -> int:
    """Of preempted sequences, on the host."""
    parts = [part for saved in rank_of(engine)._saved.values() for part in vars(saved).values()]
    kept = [of_layer for part in parts for of_layer in part.values()]
    return sum(tensor.nbytes for one in kept for tensor in (one if type(one) is tuple else (one,)))
