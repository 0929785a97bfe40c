"""One rank's process as its coordinator sees it: what it says, and how it ended."""

import logging
import signal
import time
from collections import deque
from typing import Any

from model.engine.channel import limit_sends
from model.engine.config import EngineConfig
from model.engine.messages import Alive, AreYouThere, Failed, OutOfMemory, Start
from model.engine.rank_host import RankHost
from model.engine.transport import MeetingPoint
from model.engine.vital_signs import VitalSigns
from schemas.errors import ConfigError


class RankProcess:
    """Starts the process on construction. `inbox`: messages that were read and not yet used."""

    def __init__(
        self, config: EngineConfig, rank: int, host: RankHost, meeting_point: MeetingPoint
    ) -> None:
        self.inbox: deque[Any] = deque()
        self.signs = VitalSigns()
        self._asked = False
        self.shortage: str | None = None  # why it computes nothing until it has forgotten all
        self.failure: Failed | ConfigError | None = None
        self.failed_at: float | None = None
        self.ended = False
        self._name = f"rank {rank} of {config.ranks}"
        self._exit_code: int | None = None
        self._took_nothing = False
        self._channel, self._process = host.start()
        limit_sends(self._channel, config.hang_seconds)
        log_level = logging.getLogger(__name__).getEffectiveLevel()
        self.tell(Start(config, rank, host.gpu, meeting_point, log_level))

    def fileno(self) -> int:
        """Ready to be read when `listen` will not wait."""
        return self._channel.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def busy_seconds(self) -> float:
        """That it computed, as far as it has told."""
        return self.signs.last.busy_seconds if self.signs.last else 0.0

    @property
    def doing(self) -> str:
        """In words, as far as it has told."""
        return f"{self._name} {self.signs.last.doing if self.signs.last else 'starting'}"

    @property
    def killed(self) -> bool:
        """Was it ended by a signal, not by itself?"""
        return (self._exit_code or 0) < 0

    def tell(self, message: Any) -> None:
        """Send a message. One to a process that is gone is dropped: `listen` will notice. One that
        takes nothing, though a thread of it has nothing else to do, hangs and is killed."""
        try:
            self._channel.send(message)
        except BlockingIOError:
            self._took_nothing = True
            self._process.kill()
        except OSError:
            pass

    def ask(self) -> None:
        """Whether it is there, unless that has been asked and not answered."""
        if not self._asked:
            self._asked = True
            self.tell(AreYouThere())

    def listen(self) -> None:
        """Wait for the next message, or for its failure, or for its end."""
        try:
            message = self._channel.recv()
        except (EOFError, OSError):
            self.ended = True
            self.failed_at = self.failed_at or time.monotonic()
            self.join(1.0)
            return
        if isinstance(message, Alive):
            self._asked = False
            self.signs.heard(message)
        elif isinstance(message, Failed | ConfigError):
            self.failure, self.failed_at = message, time.monotonic()
        elif isinstance(message, OutOfMemory):
            self.shortage = message.message
        else:
            self.inbox.append(message)

    def describe(self) -> str:
        """How it ended, in words, with the traceback if it sent one."""
        code = self._exit_code
        how = "is ending" if code is None else f"ended with exit code {code}"
        if self.killed:
            how = "took no message, and " if self._took_nothing else ""
            how += f"was killed by {signal.Signals(-(code or 0)).name}"
        detail = f":\n{self.failure.traceback}" if isinstance(self.failure, Failed) else ""
        return f"{self} {how}{detail}"

    def __str__(self) -> str:
        return f"{self._name} ({self._process.name})"

    def hang_up(self) -> None:
        """Close the channel, upon which the process ends itself."""
        self._channel.close()

    def join(self, seconds: float) -> bool:
        """Wait for the process to end; has it?"""
        self._exit_code = self._process.wait(seconds)
        return self._exit_code is not None

    def kill(self) -> None:
        self._process.kill()
