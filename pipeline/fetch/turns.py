"""Takes turns at hosts: so many requests to one at a time, so many a second, for all processes of
a machine together, since each read task of a run is a process of its own.

Locks on files do it, which the kernel gives back when a process dies.
"""

import fcntl
import os
import random
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BUCKETS = 1024  # of hosts: two that fall into one share its turns, which hurts neither much
_LONGEST_PAUSE_S = 60.0
_POLL_S = 0.02
_STAMP = struct.Struct("d")


class Turns:
    """requests: to one host at a time. rate: requests to one host in a second."""

    def __init__(self, requests: int, rate: float, folder: str | None = None) -> None:
        self._requests = requests
        self._gap = 1 / rate
        self._folder = Path(folder or f"{tempfile.gettempdir()}/vl01-hosts-{os.getuid()}")
        self._folder.mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def take(self, host: str) -> Iterator[None]:
        """Waits until a request to the host may begin; it is to end with the context."""
        slot = self._slot(host)
        try:
            time.sleep(self._wait(host))
            yield
        finally:
            os.close(slot)  # and with it its lock

    def pause(self, host: str, seconds: float) -> None:
        """Lets no request to the host begin for a while, as it has asked."""
        self._after(host, min(seconds, _LONGEST_PAUSE_S), 0.0)

    def _slot(self, host: str) -> int:
        """One of the host's slots, locked: an open file."""
        while True:
            for number in range(self._requests):
                file = self._open(host, f"slot{number}")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return file
                except BlockingIOError:
                    os.close(file)
            time.sleep(_POLL_S * (0.5 + random.random()))

    def _wait(self, host: str) -> float:
        """Seconds until this request may begin."""
        return self._after(host, 0.0, self._gap)

    def _after(self, host: str, delay: float, gap: float) -> float:
        """Seconds until the later of `delay` and the host's next free moment, which is put off to
        `gap` after that.

        The clock is the machine's, which all processes share; a moment too far away was written
        before the machine was started anew.
        """
        file = self._open(host, "next")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            now = time.monotonic()
            stored = os.pread(file, _STAMP.size, 0)
            free = _STAMP.unpack(stored)[0] if len(stored) == _STAMP.size else now
            if free > now + 2 * _LONGEST_PAUSE_S + self._requests * self._gap:
                free = now
            begin = max(now + delay, free)
            os.pwrite(file, _STAMP.pack(begin + gap), 0)
            return begin - now
        finally:
            os.close(file)

    def _open(self, host: str, name: str) -> int:
        bucket = zlib.crc32(host.encode()) % _BUCKETS
        path = self._folder / f"{bucket:04}.{name}"
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
