"""How far a rank has come, for a coordinator that asks whether it still comes on."""

import sys
import threading
import time
from typing import Any

import torch

from model.decoder import Decoder
from model.engine.busy import BusyClock
from model.engine.messages import Alive

_COMPILER = "triton.compiler.compiler"
_CPU_SECONDS = 0.1  # a step; a thread that waits for ever uses none


class Progress:
    """Written by the thread that works, read by the one that answers. See vital_signs.py."""

    def __init__(self) -> None:
        self._doing, self._waits = "starting", False
        self._steps = 0
        self._clock: BusyClock | None = None  # None until there is progress to be seen

    def follow(self, decoder: Decoder, device: torch.device) -> BusyClock:
        """Count from now on what this clock measures, the parts of layers, and on CPU the time that
        the calling thread uses."""
        layers = list(decoder.layers.values())
        modules = [*layers, *(part for layer in layers for part in layer.children())]
        if decoder.is_first:
            modules += decoder.vision_tower.layers
        for module in modules:
            module.register_forward_hook(self._step)
        self._thread = threading.get_ident()
        self._thread_clock = time.pthread_getcpuclockid(self._thread)
        self._clock = BusyClock(device)
        return self._clock

    def at(self, doing: str, *, waits: bool = False) -> None:
        """doing: in words. waits: for another rank, or for work."""
        self._doing, self._waits = doing, waits
        self._steps += 1

    def alive(self) -> Alive:
        clock = self._clock
        if clock is None:
            return Alive(self._doing, None, waits=True, busy_seconds=0.0)
        if clock.on_cuda and self._compiles():
            return Alive(f"compiling a kernel, {self._doing}", None, self._waits, clock.seconds)
        seconds, progress = clock.seconds, self._steps + clock.finished
        if not clock.on_cuda:
            progress += int(time.clock_gettime(self._thread_clock) / _CPU_SECONDS)
        # The host may be done with what its device computes; or be so far ahead of a device that
        # waits for the rank before that it can launch no more.
        waits = clock.device_waits or (self._waits and not clock.device_computes)
        return Alive(self._doing, progress, waits, seconds)

    def _compiles(self) -> bool:
        """The part of a layer that is the first to launch a kernel waits until Triton compiled it:
        a second on an idle host, and far longer for several where all ranks do so at once.

        Read from the thread's stack: Triton 3.6 calls a hook only if a kernel's constants can be
        written as JSON, and layouts cannot.
        """
        frame = sys._current_frames().get(self._thread)
        while frame and frame.f_globals.get("__name__") != _COMPILER:
            frame = frame.f_back
        return frame is not None

    def _step(self, *_: Any) -> None:
        self._steps += 1
