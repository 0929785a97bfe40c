"""How long a rank computes: by the device's own events on CUDA, by the clock elsewhere."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BusyClock:
    """Adds up what is computed inside `computing`, without waiting for the device.

    One thread computes; any may read.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._finished = 0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._reading = threading.Lock()

    @property
    def seconds(self) -> float:
        """Of what has been computed so far; on CUDA, of what the device has finished."""
        self._read()
        return self._seconds

    @property
    def finished(self) -> int:
        """How many spans of time that is."""
        self._read()
        return self._finished

    @property
    def device_computes(self) -> bool:
        """Is a CUDA device at work on what it was given? Not while it waits for another's."""
        with self._reading:
            began, ended = self._pending[0] if self._pending else (None, None)
        return bool(began and ended and began.query() and not ended.query())

    @contextmanager
    def computing(self) -> Iterator[None]:
        if self.on_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._pending.append((began, ended))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            self._finished += 1

    def _read(self) -> None:
        with self._reading:
            while self._pending and self._pending[0][1].query():
                began, ended = self._pending.popleft()
                self._seconds += began.elapsed_time(ended) / 1000
                self._finished += 1
