"""The one rank of an engine that needs no more: in this process, without torch.distributed."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from model.engine.config import EngineConfig
from model.engine.memory import share_out
from model.engine.microbatch import Image, Microbatch, Sampled, SampledOnDevice
from model.engine.rank import Rank
from schemas.errors import EngineError


class RankInProcess:
    """Has the methods of RankProcesses; `submit` computes at once, or on cuda, hands to the GPU."""

    def __init__(self, config: EngineConfig) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        rank = Rank(config, 0)
        self.capacity = share_out([rank.room()], config.most_sequences, config.tokens_per_sequence)
        rank.allocate(self.capacity)
        self._rank: Rank | None = rank
        self._sampled: deque[SampledOnDevice] = deque()

    @property
    def pids(self) -> list[int]:
        return [os.getpid()]

    @torch.inference_mode()
    def submit(self, images: Sequence[Image], microbatch: Microbatch) -> None:
        rank = self._rank
        if rank is None:
            raise EngineError("the engine is closed")
        with _failure_explained():
            for image in images:
                rank.take_image(image)
            rank.swap(microbatch.plan)
            hidden_TD = rank.forward(rank.embed(microbatch), microbatch.plan)
            self._sampled.append(rank.sample(hidden_TD, microbatch))

    def receive(self) -> Sampled:
        with _failure_explained():  # what fails on a GPU is first heard of here
            return self._sampled.popleft().wait()

    def close(self) -> None:
        """Give the weights and the memory back."""
        self._rank = None


@contextmanager
def _failure_explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise EngineError(f"rank 0 of 1 failed: {type(error).__name__}: {error}") from error
