"""Kills this process once it is stopped (SIGSTOP), stuck in a call that lets none of its threads
run, or not well by its own account. A child process does so, since no thread could; watchdog.py
looks what the threads are at.

The child is this file, run by its path: it imports nothing but Python's own and takes 10 MB.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

_SECONDS_BETWEEN = 1.0  # two signs


def guard(patience: float, well: Callable[[], bool] = lambda: True) -> None:
    """From now on, until this process ends. patience: seconds without a sign, as
    EngineConfig.hang_seconds. well: no sign is given while it says no."""
    reading, writing = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(patience)], stdin=reading
    )
    os.close(reading)

    def give_signs() -> None:
        while child.poll() is None:
            if well():
                os.write(writing, b".")
            time.sleep(_SECONDS_BETWEEN)

    threading.Thread(target=give_signs, name="signs-of-life", daemon=True).start()


def _watch(pid: int, patience: float) -> None:
    """Signs come through standard input, whose end is that of the process which is watched."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: that process decides
    silent = 0.0
    while silent <= patience:
        started = time.monotonic()
        signs, _, _ = select.select([0], [], [], _SECONDS_BETWEEN)
        if signs and not os.read(0, 4096):
            return
        # Not what passed while this process was stopped too, as by Ctrl-Z.
        silent += min(time.monotonic() - started, 2 * _SECONDS_BETWEEN)
        if signs:
            silent = 0.0
    print(f"process {pid} has given no sign for {silent:.0f} s: killed", file=sys.stderr)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]))
