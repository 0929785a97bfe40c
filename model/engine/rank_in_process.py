"""The one rank of an engine that needs no more: in this process, without torch.distributed."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from model.decoder import Decoder
from model.engine.config import EngineConfig
from model.engine.memory import share_out
from model.engine.messages import Alive
from model.engine.microbatch import Image, Microbatch, Sampled, SampledOnDevice
from model.engine.progress import Progress
from model.engine.rank import Rank, Scored
from model.engine.sampling import Masks
from schemas.errors import EngineError, OutOfMemoryError


class RankInProcess:
    """Has the methods of RankProcesses; `submit` computes at once, or on cuda, hands to the GPU."""

    def __init__(self, config: EngineConfig, at: Callable[[str], None]) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        rank = Rank(config, 0, config.rank_device(0), lambda doing: at(f"rank 0 of 1 {doing}"))
        self.capacity = share_out([rank.room()], config.most_sequences, config.tokens_per_sequence)
        rank.allocate(self.capacity)
        self._rank: Rank | None = rank
        self._progress = Progress()
        self._clock = self._progress.follow(rank.decoder, rank.device)
        self._scored: Scored | None = None  # waits for its masks
        self._sampled: deque[SampledOnDevice] = deque()

    @property
    def pids(self) -> list[int]:
        return [os.getpid()]

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """That the rank has computed."""
        return (self._clock.seconds,)

    @property
    def alive(self) -> Alive:
        """What the rank is doing; to be asked from another thread than the one that made this."""
        return self._progress.alive()

    @property
    def decoder(self) -> Decoder:
        return self._open_rank.decoder

    @torch.inference_mode()
    def submit(self, images: Sequence[Image], microbatch: Microbatch) -> None:
        rank = self._open_rank
        assert self._scored is None  # tokens are chosen in order
        self._progress.at(f"computing microbatch {microbatch.plan.number}")
        with _failure_explained(), self._clock.computing():
            for image in images:
                rank.take_image(image)
            rank.swap(microbatch.plan)
            hidden_TD = rank.forward(rank.embed(microbatch), microbatch.plan)
            scored = rank.score(hidden_TD, microbatch)
            if microbatch.constrained:
                self._scored = scored
            else:
                self._sampled.append(rank.sample(scored))

    def room_for_masks(self, masks: int, words: int) -> np.ndarray:
        """int32 [C, W] from which the masks given to `constrain` next reach the device soonest."""
        return self._open_rank.mask_memory.take(masks, words)

    @torch.inference_mode()
    def constrain(self, masks: Masks) -> None:
        """Choose the tokens of the last microbatch submitted, which was waiting for its masks."""
        scored, self._scored = self._scored, None
        assert scored is not None
        with _failure_explained(), self._clock.computing():
            self._sampled.append(self._open_rank.sample(scored, masks))

    def receive(self) -> Sampled:
        self._progress.at("waiting for its GPU", waits=True)
        with _failure_explained():  # what fails on a GPU is first heard of here
            return self._sampled.popleft().wait()

    def forget(self) -> None:
        """All sequences and what was submitted of them; the weights stay."""
        self._scored = None
        self._sampled.clear()
        self._open_rank.forget()

    def close(self) -> None:
        """Give the weights and the memory back."""
        self._rank = None

    @property
    def _open_rank(self) -> Rank:
        if self._rank is None:
            raise EngineError("the engine is closed")
        return self._rank


@contextmanager
def _failure_explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"rank 0 of 1 is out of memory: {error}") from error
    except Exception as error:
        raise EngineError(f"rank 0 of 1 failed: {type(error).__name__}: {error}") from error
