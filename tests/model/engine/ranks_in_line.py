"""The ranks of an engine in one process, each of which computes as late as a dice says."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.engine.config import EngineConfig
from model.engine.memory import Capacity
from model.engine.microbatch import Image, Microbatch, Sampled, SampledOnDevice
from model.engine.rank import Rank, Scored
from model.engine.sampling import Masks
from schemas.errors import OutOfMemoryError


@dataclass
class _Stop:
    """One rank on the line. inbox: its messages. waiting: hidden states of the rank before."""

    rank: Rank
    inbox: deque[Any] = field(default_factory=deque)
    waiting: deque[tuple[int, Tensor]] = field(default_factory=deque)
    scored: Scored | None = None


class RanksInLine:
    """Has the methods of RankProcesses. Each rank takes its messages in order; which rank is next,
    and whether any is before `receive` waits for tokens, is drawn from `dice`."""

    def __init__(self, config: EngineConfig, capacity: Capacity, dice: random.Random) -> None:
        self.capacity, self._dice = capacity, dice
        self._line = [
            _Stop(Rank(config, index, config.rank_device(0), at=lambda _: None))
            for index in range(config.ranks)
        ]
        for stop in self._line:
            stop.rank.allocate(capacity)
        self._sampled: deque[SampledOnDevice] = deque()
        self._shortage: str | None = None

    @property
    def ranks(self) -> list[Rank]:
        return [stop.rank for stop in self._line]

    @torch.inference_mode()
    def submit(self, images: Sequence[Image], microbatch: Microbatch) -> None:
        self._line[0].inbox.extend(images)
        for stop in self._line:
            stop.inbox.append(microbatch)
        for _ in range(self._dice.randrange(4)):
            self._advance()

    def room_for_masks(self, masks: int, words: int) -> np.ndarray:
        return np.empty((masks, words), dtype=np.int32)

    def constrain(self, masks: Masks) -> None:
        self._line[-1].inbox.append(masks)

    @torch.inference_mode()
    def receive(self) -> Sampled:
        while not self._sampled and not self._shortage:
            assert self._advance(), "the ranks wait for each other"
        if self._shortage:
            raise OutOfMemoryError(self._shortage)
        return self._sampled.popleft().wait()

    def forget(self) -> None:
        self._shortage = None
        self._sampled.clear()
        for stop in self._line:
            stop.inbox.clear()
            stop.waiting.clear()
            stop.scored = None
            stop.rank.forget()

    def close(self) -> None:
        pass

    def _advance(self) -> bool:
        """One message of one rank, if any can go on."""
        ready = [at for at in range(len(self._line)) if self._can_go_on(at)]
        if not ready or self._shortage:
            return False
        try:
            self._take(self._dice.choice(ready))
        except torch.OutOfMemoryError as error:
            self._shortage = str(error)
        return True

    def _can_go_on(self, at: int) -> bool:
        stop = self._line[at]
        waits = at > 0 and not stop.waiting and stop.scored is None
        return bool(stop.inbox) and not waits

    def _take(self, at: int) -> None:
        stop = self._line[at]
        message = stop.inbox.popleft()
        if isinstance(message, Image):
            stop.rank.take_image(message)
        elif isinstance(message, Masks):
            assert stop.scored
            self._sampled.append(stop.rank.sample(stop.scored, message))
            stop.scored = None
        else:
            self._compute(at, message)

    def _compute(self, at: int, microbatch: Microbatch) -> None:
        stop, plan = self._line[at], microbatch.plan
        assert stop.scored is None
        stop.rank.swap(plan)
        if at:
            number, hidden_TD = stop.waiting.popleft()
            assert number == plan.number
        else:
            hidden_TD = stop.rank.embed(microbatch)
        hidden_TD = stop.rank.forward(hidden_TD, plan)
        if at + 1 < len(self._line):
            self._line[at + 1].waiting.append((plan.number, hidden_TD))
            return
        scored = stop.rank.score(hidden_TD, microbatch)
        if microbatch.constrained:
            stop.scored = scored
        else:
            self._sampled.append(stop.rank.sample(scored))
