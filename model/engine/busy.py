"""How long a rank computes: by the device's own events on CUDA, by the clock elsewhere."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BusyClock:
    """Adds up what is computed inside `computing`, without waiting for the device.

    One thread computes; any may read. Events are asked on their own device: a thread is on GPU 0
    unless it is put elsewhere, and would make a context there, half a GiB for each of the ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._device = device
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
        return self._oldest() == (True, False)

    @property
    def device_waits(self) -> bool:
        """Was it given something that it has not begun, for it waits for another's?"""
        return self._oldest() == (False, False)

    def _oldest(self) -> tuple[bool, bool] | None:
        """Has the device begun, and ended, the first of what is not known to have ended?"""
        with self._reading:
            if not self._pending:
                return None
            with torch.cuda.device(self._device):
                began, ended = (event.query() for event in self._pending[0])
                return began, ended

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
            while self._pending and self._count(*self._pending[0]):
                self._pending.popleft()

    def _count(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> bool:
        """Has the device come to the end of it?"""
        with torch.cuda.device(self._device):
            if not ended.query():
                return False
            self._seconds += began.elapsed_time(ended) / 1000
            self._finished += 1
            return True
