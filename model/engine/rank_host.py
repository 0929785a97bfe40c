"""Where the process of a rank is started: on this machine, or by a host that knows another one."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

WORKER = "model.engine.rank_worker"

_SECONDS_TO_DIE = 5.0  # of SIGKILL; one whose driver hangs may not, and nobody waits for it

# Read by glibc when a process starts. With its defaults a replica that takes pages from 16 threads
# grows by what each of them keeps (from 0.35 to 1.2 GB in 280 pages). What a CPU computes in is
# kept, up to 256 MB: given back and taken anew at each step, it made the engine twice as slow.
GIVE_MEMORY_BACK = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


class Process(Protocol):
    """A rank's process. name: its pid, and the machine if that is another one."""

    @property
    def pid(self) -> int: ...

    @property
    def name(self) -> str: ...

    def wait(self, seconds: float) -> int | None:
        """Its exit code once it has ended, -N if signal N killed it; None while it runs."""
        ...

    def kill(self) -> None: ...


class RankHost(Protocol):
    """Starts the process of one rank, again after it has ended.

    gpu: the index of the rank's own GPU among those that the process sees.
    """

    @property
    def gpu(self) -> int: ...

    def start(self) -> tuple[Connection, Process]:
        """The process and the channel to it. Raises EngineError."""
        ...


@dataclass(frozen=True)
class Hosts:
    """Of the ranks of one engine, in order, on any machines.

    address: of this machine, by which the others reach it.
    """

    address: str
    hosts: Sequence[RankHost]


@dataclass(frozen=True)
class ThisHost:
    """Starts ranks on this machine."""

    gpu: int

    def start(self) -> tuple[Connection, Process]:
        ours, theirs = socket.socketpair()
        return Connection(ours.detach()), LocalProcess(theirs)


class LocalProcess:
    """A child of this process, started on construction. It is killed when this process ends.

    channel: it gets this, which is closed here. interface: by which it reaches the other ranks,
    None leaves that to torch.distributed.
    """

    def __init__(self, channel: socket.socket, interface: str | None = "lo") -> None:
        started: Future[subprocess.Popen] = Future()

        def start_and_stay() -> None:
            # A rank asks the kernel to kill it when its parent dies, and its parent is the *thread*
            # that started it: the caller's may end long before the rank does.
            try:
                with channel:
                    process = subprocess.Popen(
                        [sys.executable, "-m", WORKER, str(channel.fileno())],
                        pass_fds=[channel.fileno()],
                        stdin=subprocess.DEVNULL,
                        env=_environment(interface),
                    )
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(process)
            process.wait()

        threading.Thread(target=start_and_stay, name="parent-of-rank", daemon=True).start()
        self._process = started.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def name(self) -> str:
        return f"pid {self.pid}"

    def wait(self, seconds: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
        return self._process.returncode

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self.wait(_SECONDS_TO_DIE)


def _environment(interface: str | None) -> dict[str, str]:
    """Of a rank: our module path, links by that interface, a glibc that gives memory back.

    torch.distributed warns about every pair of ranks that it links on first use; that is meant.
    """
    links = {}
    if interface:  # NCCL would also take eth10 for eth1
        links = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **GIVE_MEMORY_BACK,
        **links,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
