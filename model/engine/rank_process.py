"""One rank's process as its coordinator sees it: what it says, and how it ended."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from model.engine.config import EngineConfig
from model.engine.messages import Busy, Failed, Start
from schemas.errors import ConfigError

# Read by glibc when a process starts. With its defaults a replica that takes pages from 16 threads
# grew from 0.35 to 1.2 GB in 280 pages; with these it stays at 0.78.
GIVE_MEMORY_BACK = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1048576"}


class RankProcess:
    """Starts the process on construction. `inbox`: messages that were read and not yet used."""

    def __init__(self, config: EngineConfig, rank: int, meeting_point: Path) -> None:
        self.inbox: deque[Any] = deque()
        self.busy_seconds = 0.0  # that it computed, as far as it has told
        self.failure: Failed | ConfigError | None = None
        self.failed_at: float | None = None
        self.ended = False
        self._name = f"rank {rank} of {config.ranks}"
        ours, theirs = socket.socketpair()
        self._channel = Connection(ours.detach())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "model.engine.rank_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        log_level = logging.getLogger(__name__).getEffectiveLevel()
        self.tell(Start(config, rank, meeting_point, log_level))

    def fileno(self) -> int:
        """Ready to be read when `listen` will not wait."""
        return self._channel.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def killed(self) -> bool:
        """Was it ended by a signal, not by itself?"""
        return (self._process.poll() or 0) < 0

    def tell(self, message: Any) -> None:
        """Send a message. One to a process that is gone is dropped: `listen` will notice."""
        with suppress(OSError):
            self._channel.send(message)

    def listen(self) -> None:
        """Wait for the next message, or for its failure, or for its end."""
        try:
            message = self._channel.recv()
        except (EOFError, OSError):
            self.ended = True
            self.failed_at = self.failed_at or time.monotonic()
            self.join(1.0)
            return
        if isinstance(message, Busy):
            self.busy_seconds = message.seconds
        elif isinstance(message, Failed | ConfigError):
            self.failure, self.failed_at = message, time.monotonic()
        else:
            self.inbox.append(message)

    def describe(self) -> str:
        """How it ended, in words, with the traceback if it sent one."""
        code = self._process.poll()
        how = "is ending" if code is None else f"ended with exit code {code}"
        if self.killed:
            how = f"was killed by {signal.Signals(-(code or 0)).name}"
        detail = f":\n{self.failure.traceback}" if isinstance(self.failure, Failed) else ""
        return f"{self._name} (pid {self.pid}) {how}{detail}"

    def hang_up(self) -> None:
        """Close the channel, upon which the process ends itself."""
        self._channel.close()

    def join(self, seconds: float) -> bool:
        """Wait for the process to end; has it?"""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    """Of a rank: our module path, links that stay on this host, a glibc that gives memory back.

    torch.distributed warns about every pair of ranks that it links on first use; that is meant.
    """
    return {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **GIVE_MEMORY_BACK,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
