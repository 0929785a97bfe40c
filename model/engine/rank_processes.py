"""All ranks of one engine, each in a process of its own."""

import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, NoReturn

import numpy as np

from model.engine.config import EngineConfig
from model.engine.memory import share_out
from model.engine.messages import Alive, Forget, Forgotten
from model.engine.microbatch import Image, Microbatch, Sampled
from model.engine.rank_host import Hosts, RankHost, ThisHost
from model.engine.rank_process import RankProcess
from model.engine.sampling import Masks
from model.engine.transport import Meeting
from model.engine.vital_signs import hung
from schemas.errors import ConfigError, EngineError, OutOfMemoryError

_SECONDS_TO_END = 5.0  # what a rank gets to end by itself before it is killed
_SECONDS_BETWEEN = 1.0  # two times that the ranks are asked whether they are there
_SECONDS_TO_EXPLAIN = 2.0  # after a failure: for those it takes along, so that all are named


class RankProcesses:
    """Starts `config.ranks` processes, and waits until all have loaded their layers.

    hosts: None starts them on this machine, rank r with GPU r. at: as of an Engine.
    Takes microbatches with `submit` and hands back their tokens with `receive`, in order.
    Both it and `forget` raise EngineError once a rank has failed, died or hung, with its exit code
    and traceback, or the ranks are closed. So does the start, with ConfigError when a rank found
    the checkpoint or the memory wanting.
    """

    def __init__(
        self,
        config: EngineConfig,
        hosts: Hosts | None,
        at: Callable[[str], None],
    ) -> None:
        self._error: EngineError | ConfigError | None = None
        self._meeting: Meeting | None = Meeting(hosts.address if hosts else None)
        self._ranks: list[RankProcess] = []
        self._patience = config.hang_seconds
        self._turns = 0  # of this coordinator: it comes on, whatever the ranks do
        self._asked = time.monotonic()  # when the ranks were last asked whether they are there
        try:
            for index, host in enumerate(hosts.hosts if hosts else _on_this_machine(config)):
                self._ranks.append(RankProcess(config, index, host, self._meeting.point))
            rooms = [self._hear(rank, at) for rank in self._ranks]
            self.capacity = share_out(rooms, config.most_sequences, config.tokens_per_sequence)
            for rank in self._ranks:
                rank.tell(self.capacity)
            for rank in self._ranks:
                self._hear(rank, at)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """That each rank has computed, as far as they have told; some seconds old."""
        return tuple(rank.busy_seconds for rank in self._ranks)

    @property
    def alive(self) -> Alive:
        """What the coordinator is doing; to be asked from another thread than the one that has it
        do so. It waits for its ranks a second at a time, and so comes on while it does."""
        return Alive("telling its ranks or hearing them", self._turns, waits=False, busy_seconds=0)

    def submit(self, images: Sequence[Image], microbatch: Microbatch) -> None:
        self._turns += 1
        for image in images:
            self._ranks[0].tell(image)
        for rank in self._ranks:
            rank.tell(microbatch)

    def room_for_masks(self, masks: int, words: int) -> np.ndarray:
        """int32 [C, W] for the masks given to `constrain` next."""
        return np.empty((masks, words), dtype=np.int32)

    def constrain(self, masks: Masks) -> None:
        """The masks of the last microbatch submitted, which is constrained."""
        self._ranks[-1].tell(masks)

    def receive(self) -> Sampled:
        """The tokens of the oldest microbatch that was submitted and not received.

        Raises OutOfMemoryError when a rank had too little memory to compute it or one after it;
        then `forget` is next.
        """
        last = self._ranks[-1]
        while True:
            for rank in self._ranks:
                if rank.shortage:
                    raise OutOfMemoryError(f"{rank} is out of memory: {rank.shortage}")
            if last.inbox and not self._error:
                return last.inbox.popleft()
            self._listen()

    def forget(self) -> None:
        """All sequences and what was submitted of them; the weights stay."""
        for rank in self._ranks:
            rank.tell(Forget())
        for rank in self._ranks:
            while not isinstance(self._hear(rank), Forgotten):
                pass  # tokens of before
        for rank in self._ranks:
            rank.shortage = None  # also of those that ran out of memory meanwhile

    def close(self) -> None:
        """End all ranks: they end when their channels close, and are killed if they do not."""
        for rank in self._ranks:
            rank.hang_up()
        deadline = time.monotonic() + _SECONDS_TO_END
        for rank in self._ranks:
            if not rank.join(deadline - time.monotonic()):
                rank.kill()
        self._error = self._error or EngineError("the engine is closed")
        self._meeting = None

    def _hear(self, rank: RankProcess, at: Callable[[str], None] | None = None) -> Any:
        """The next message of one rank. at: is told what it is doing meanwhile."""
        while not rank.inbox:
            self._listen()
            if at:
                at(rank.doing)
        return rank.inbox.popleft()

    def _listen(self) -> None:
        """Wait for a while until any rank has said something. The end of any of them is a failure,
        and so is that it hangs."""
        if self._error:
            raise self._error
        self._turns += 1
        started = time.monotonic()
        if started - self._asked > _SECONDS_BETWEEN:
            self._asked = started
            for rank in self._ranks:
                rank.ask()
        for speaking in _speaking(self._ranks, _SECONDS_BETWEEN):
            speaking.listen()
        if any(rank.failed_at for rank in self._ranks):
            self._fail()
        # Not what passed while all processes of this machine, or its container, were halted.
        waited = min(time.monotonic() - started, 2 * _SECONDS_BETWEEN)
        for rank in self._ranks:
            rank.signs.passed(waited)
        if found := hung([rank.signs for rank in self._ranks], self._patience):
            self._end_hung({self._ranks[index]: how for index, how in found.items()})

    def _end_hung(self, found: dict[RankProcess, str]) -> NoReturn:
        self._error = EngineError("\n".join(f"{rank} hangs: {how}" for rank, how in found.items()))
        for rank in found:
            rank.kill()  # it would not end by itself
        self.close()
        raise self._error

    def _fail(self) -> NoReturn:
        """Hear out the ranks that are ending, end the others, and raise what happened."""
        deadline = time.monotonic() + _SECONDS_TO_EXPLAIN
        # One that was killed took the others along: what they say adds nothing.
        while not any(rank.killed for rank in self._ranks):
            left = [rank for rank in self._ranks if not rank.ended]
            speaking = _speaking(left, deadline - time.monotonic()) if left else []
            if not speaking:
                break
            for rank in speaking:
                rank.listen()
        failed = [rank for rank in self._ranks if rank.killed or rank.failed_at]
        self.close()  # how each ended is known only then: to give a full GPU back takes seconds
        failed.sort(key=lambda rank: (not rank.killed, rank.failed_at or 0.0))
        wanting = [rank.failure for rank in failed if isinstance(rank.failure, ConfigError)]
        what_happened = "\n".join(rank.describe() for rank in failed)
        self._error = wanting[0] if wanting else EngineError(what_happened)
        raise self._error


def _on_this_machine(config: EngineConfig) -> Sequence[RankHost]:
    return [ThisHost(gpu=rank) for rank in range(config.ranks)]


def _speaking(ranks: list[RankProcess], seconds: float | None = None) -> list[RankProcess]:
    """Those with something to listen to; waits for it until the time is up."""
    return wait(ranks, seconds)  # type: ignore[arg-type, return-value]
