"""How long a rank computes: by the device's own events on CUDA, by the clock elsewhere."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BusyClock:
    """Adds up what is computed inside `computing`, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        """Of what has been computed so far; on CUDA, of what the device has finished."""
        while self._pending and self._pending[0][1].query():
            began, ended = self._pending.popleft()
            self._seconds += began.elapsed_time(ended) / 1000
        return self._seconds

    @contextmanager
    def computing(self) -> Iterator[None]:
        if self._on_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._pending.append((began, ended))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
