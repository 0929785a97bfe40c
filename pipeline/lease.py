"""One driver at a time may write to an output: it holds the lease and keeps refreshing it.

A lease is taken over when its holder is surely gone: its process is dead on this machine, or its
beat has stopped elsewhere. Workers outlive a killed driver for a moment, but only drivers commit.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from pipeline.ledger import Ledger
from schemas.errors import LedgerError

REFRESH_S = 10.0
EXPIRE_S = 60.0
_SETTLE_S = 0.2  # between writing a lease and reading it back: another may write at the same time
_FILE = "lease.json"


@dataclass(frozen=True)
class Holder:
    """What lease.json says. machine: a host name is not enough, containers share them and their
    process ids. started: tells a process from a later one with the same id."""

    run: str
    host: str
    machine: str
    pid: int
    started: str
    refreshed_at: float
    beat: int = 0

    @property
    def age(self) -> float:
        """Seconds since its last beat, by this machine's clock."""
        return max(0, time.time() - self.refreshed_at)

    def seems_alive(self, expire_s: float = EXPIRE_S) -> bool:
        """Certain where the holder runs on this machine; elsewhere as far as clocks agree."""
        if self.machine == _machine():
            return _started(self.pid) == self.started
        return self.age < expire_s


def read_holder(ledger: Ledger) -> Holder | None:
    """Who holds the lease, alive or not. Raises LedgerError when it is damaged."""
    try:
        return Holder(**json.loads(ledger.read(_FILE)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise LedgerError(
            f"{_FILE} of {ledger.output} is damaged ({error}); "
            "remove it if no other run is writing there"
        ) from error


class Lease:
    """A context: acquired at its start, released at its end. `run` names the run that holds it."""

    def __init__(
        self, ledger: Ledger, refresh_s: float = REFRESH_S, expire_s: float = EXPIRE_S
    ) -> None:
        self.run = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid4().hex[:6]}"
        self._ledger = ledger
        self._refresh_s = refresh_s
        self._expire_s = expire_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_refreshing, daemon=True, name="lease")

    def __enter__(self) -> "Lease":
        """Raises LedgerError when another run holds the lease."""
        if holder := self._read():
            self._refuse_if_alive(holder)
        try:
            self._write(0)
            time.sleep(_SETTLE_S)
            self.check()
        except BaseException:
            self._release()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._release()

    def _release(self) -> None:
        with suppress(Exception):  # it expires by itself; the run's own error matters more
            if self._held_by() == self.run:
                self._ledger.remove(_FILE)

    def check(self) -> None:
        """To be called before every commit. Raises LedgerError when the lease is lost."""
        if (run := self._held_by()) != self.run:
            what = f"taken over by run {run}" if run else "removed"
            raise LedgerError(
                f"the lease on {self._ledger.output} was {what}; this run ({self.run}) stops"
            )

    def _refuse_if_alive(self, holder: Holder) -> None:
        if holder.seems_alive(self._expire_s):
            self._refuse(holder)
        if holder.machine == _machine():
            return
        # Its clock may be behind ours: it is gone when nothing changes for two of its beats.
        time.sleep(2 * self._refresh_s)
        if (later := self._read()) and later != holder:
            self._refuse(later)

    def _refuse(self, holder: Holder) -> None:
        raise LedgerError(
            f"another run is writing to {self._ledger.output}: process {holder.pid} on "
            f"{holder.host}, alive {holder.age:.0f} s ago. Wait for it, or stop it; a run that "
            f"died on another machine holds its lease for {self._expire_s:.0f} s more"
        )

    def _keep_refreshing(self) -> None:
        beat = 1
        while not self._stop.wait(self._refresh_s):
            try:
                if self._held_by() != self.run:
                    return  # `check` will say so
                self._write(beat)
            except Exception:  # the storage may come back before the lease expires
                continue
            beat += 1

    def _write(self, beat: int) -> None:
        pid = os.getpid()
        holder = Holder(
            self.run, socket.gethostname(), _machine(), pid, _started(pid), time.time(), beat
        )
        self._ledger.write(_FILE, json.dumps(asdict(holder), indent=1).encode())

    def _held_by(self) -> str | None:
        holder = self._read()
        return holder and holder.run

    def _read(self) -> Holder | None:
        return read_holder(self._ledger)


def _machine() -> str:
    """This kernel since its start, and this container's view of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process started, in any fixed form; empty if it is not running."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        pass
    if Path("/proc/self").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"
