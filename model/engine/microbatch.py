"""From a plan to what the ranks need: the tokens' ids and draws, then tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from model.engine.plan import Plan
from model.engine.sampling import Draw
from model.layers.ragged import BatchOnHost, to_device

# A token that was sampled in the microbatch before and which only the device knows yet.
ON_DEVICE = -1


@dataclass(frozen=True)
class Image:
    """The tiles of a sequence whose first chunk is in this microbatch; for the first rank only.

    tiles: uint8 [N, tile, tile, 3], the thumbnail first. size: (width, height) of the image.
    """

    sequence: int
    tiles: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True)
class Microbatch:
    """A plan with its contents. token_ids: int32 [T], the segments laid end to end, with ON_DEVICE
    for the last token sampled for a sequence's slot where the host has not seen it yet.

    draws: how to choose a token, for each sampling segment in order.
    constrained: the draws wait for Masks, which follow; everything before them does not.
    """

    plan: Plan
    token_ids: np.ndarray
    draws: tuple[Draw, ...]
    constrained: bool = False


@dataclass(frozen=True)
class Sampled:
    """What the last rank hands back: a token and its log-probability for each draw, in order."""

    number: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class SampledOnDevice:
    """What `choose` chose for a microbatch, on its way to the host."""

    def __init__(self, number: int, tokens_N: Tensor, logprobs_N: Tensor) -> None:
        self._number = number
        # A copy that is not waited for goes to pinned memory.
        self._tokens_N, self._logprobs_N = (
            column.to("cpu", non_blocking=True) for column in (tokens_N, logprobs_N)
        )
        self._copied = torch.cuda.Event() if tokens_N.is_cuda else None
        if self._copied:
            self._copied.record()

    def wait(self) -> Sampled:
        if self._copied:
            self._copied.synchronize()
        tokens, logprobs = self._tokens_N.tolist(), self._logprobs_N.tolist()
        return Sampled(self._number, tuple(tokens), tuple(logprobs))


def batch_of(plan: Plan) -> BatchOnHost:
    segments = plan.segments
    return BatchOnHost.build(
        lengths=[segment.length for segment in segments],
        contexts=[segment.context for segment in segments],
        slots=[segment.slot for segment in segments],
        block_tables=[segment.blocks for segment in segments],
    )


def last_rows(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [N] each: the row of the last token of each sampling segment, and its slot."""
    ends = accumulate(segment.length for segment in plan.segments)
    rows = [end - 1 for end, segment in zip(ends, plan.segments, strict=True) if segment.samples]
    slots = [segment.slot for segment in plan.sampling_segments]
    rows_N, slots_N = to_device([rows, slots], device)
    return rows_N.long(), slots_N.long()


def rows_of(plan: Plan) -> Sequence[range]:
    """The rows of each segment in the microbatch."""
    ends = accumulate(segment.length for segment in plan.segments)
    return [
        range(end - segment.length, end) for end, segment in zip(ends, plan.segments, strict=True)
    ]
