"""From a plan to what the ranks need: the tokens' ids and draws, then tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.engine.plan import Plan
from model.engine.sampling import Draw
from model.layers.ragged import RaggedBatch


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
    """A plan with its contents. token_ids: int32 [T], the segments laid end to end.

    draws: how to choose a token, for each sampling segment in order.
    """

    plan: Plan
    token_ids: np.ndarray
    draws: tuple[Draw, ...]


@dataclass(frozen=True)
class Sampled:
    """What the last rank hands back: a token and its log-probability for each draw, in order."""

    number: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def ragged_batch(plan: Plan, device: torch.device) -> RaggedBatch:
    segments = plan.segments
    return RaggedBatch.build(
        lengths=[segment.length for segment in segments],
        contexts=[segment.context for segment in segments],
        slots=[segment.slot for segment in segments],
        block_tables=[segment.blocks for segment in segments],
        device=device,
    )


def last_rows(plan: Plan, device: torch.device) -> Tensor:
    """int64 [N]: the row of the last token of each sampling segment."""
    ends = np.cumsum([segment.length for segment in plan.segments])
    rows = [end - 1 for end, segment in zip(ends, plan.segments, strict=True) if segment.samples]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def rows_of(plan: Plan) -> Sequence[range]:
    """The rows of each segment in the microbatch."""
    ends = np.cumsum([segment.length for segment in plan.segments]).tolist()
    return [
        range(end - segment.length, end) for end, segment in zip(ends, plan.segments, strict=True)
    ]
