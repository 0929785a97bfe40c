"""Chooses next tokens from logits. Keeps no state: a draw depends on its own arguments alone.

Shapes: N sequences, V vocabulary; C of the sequences are constrained, W = ceil(V / 32), B = 4 W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.layers.dispatch import logits_kernels

_MASK = (1 << 64) - 1

# Below the first, logits divided by the temperature overflow fp32; above the second, it overflows.
# At them sampling is greedy already, and blind.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-20, 1e30


@dataclass(frozen=True)
class Draw:
    """How one token is chosen: greedily at temperature 0, else by `uniform` in [0, 1), which walks
    the tokens in the order of the vocabulary, or below a top_p of 1 from the likeliest on."""

    temperature: float
    top_p: float
    uniform: float


@dataclass(frozen=True)
class Masks:
    """Which tokens some of the sequences of a microbatch may get.

    number: of the microbatch. rows: which of its draws, in order.
    bits_CW: int32 [C, W], a row for each: bit v % 32 of word v // 32 is 1 if token v is allowed.
    """

    number: int
    rows: tuple[int, ...]
    bits_CW: np.ndarray


@dataclass(frozen=True)
class MasksOnDevice:
    """The same where the logits are. rows_C: int32. bits_CW: int32, contiguous."""

    rows_C: Tensor
    bits_CW: Tensor


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: 53 bits of a counter's hash.

    The seed picks a starting point and the position counts from it, by the steps and the mixing
    of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    return (_mix(_mix(seed & _MASK) + position * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def choose(
    logits_NV: Tensor, draws: Sequence[Draw], masks: MasksOnDevice | None = None
) -> tuple[Tensor, Tensor]:
    """A token for each row of fp32 logits, int64 [N], and its log-probability at temperature 1,
    fp32 [N]; on the device of the logits, and the host waits for nothing.

    The log-probability is of the whole vocabulary, before any mask: how sure the model itself was.
    Every row is computed by itself: the other rows change no bit of it. Overwrites the logits of
    constrained rows.
    """
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    if masks and len(masks.rows_C):
        _mask(logits_NV, masks)
    tokens_N = logits_NV.argmax(dim=-1)
    whole = [row for row, draw in enumerate(draws) if draw.temperature > 0 and draw.top_p >= 1]
    parts = [row for row, draw in enumerate(draws) if draw.temperature > 0 and draw.top_p < 1]
    for rows, draw in ((whole, _draw_from_all), (parts, _draw_from_nucleus)):
        if rows:
            rows_N, *settings_N1 = _settings(rows, draws, logits_NV.device)
            tokens_N[rows_N] = draw(logits_NV[rows_N], *settings_N1)
    return tokens_N, logprobs_NV.gather(1, tokens_N[:, None])[:, 0]


def _mask(logits_NV: Tensor, masks: MasksOnDevice) -> None:
    """Writes -inf for each token that is not allowed. Unpacked where the logits are."""
    if fast := logits_kernels(logits_NV):
        fast.mask_logits(logits_NV, masks.rows_C, masks.bits_CW)
        return
    bits_CB = masks.bits_CW.view(torch.uint8)
    bit = 1 << torch.arange(8, dtype=torch.uint8, device=logits_NV.device)
    ruled_out_CV = ((bits_CB[:, :, None] & bit) == 0).flatten(1)[:, : logits_NV.shape[1]]
    # As bytes to their rows, and then in place: the logits themselves are four times as large.
    ruled_out_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
    ruled_out_NV[masks.rows_C.long()] = ruled_out_CV
    logits_NV.masked_fill_(ruled_out_NV, float("-inf"))


def _settings(
    rows: Sequence[int], draws: Sequence[Draw], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows, int64 [N], and their temperatures, top_p and uniforms, fp32 [N, 1] each."""
    settings = torch.tensor(
        [
            (row, _within_fp32(draws[row].temperature), draws[row].top_p, draws[row].uniform)
            for row in rows
        ],
        dtype=torch.float32,  # in which rows are whole numbers too
        pin_memory=device.type == "cuda",
    ).to(device, non_blocking=True)  # fmt: skip
    rows_N1, temperature_N1, top_p_N1, uniform_N1 = settings.split(1, dim=1)
    return rows_N1[:, 0].long(), temperature_N1, top_p_N1, uniform_N1


def _within_fp32(temperature: float) -> float:
    return min(max(temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE)


def _draw_from_all(
    logits_NV: Tensor, temperature_N1: Tensor, _top_p_N1: Tensor, uniform_N1: Tensor
) -> Tensor:
    """Inverse of the distribution function over all tokens, in the order of the vocabulary."""
    probs_NV = torch.softmax(logits_NV / temperature_N1, dim=-1)
    cumulative_NV = _cumulative(probs_NV)
    # Summed in parallel, it may rise by rounding where a token's own probability is 0.
    possible_NV = probs_NV > 0
    reached_NV = (cumulative_NV > uniform_N1 * cumulative_NV[:, -1:]) & possible_NV
    # None is when the uniform is rounded to 1: then it is the last possible one.
    last_N = logits_NV.shape[1] - 1 - possible_NV.flip(-1).byte().argmax(dim=-1)
    return torch.where(reached_NV.any(dim=-1), reached_NV.byte().argmax(dim=-1), last_N)


def _draw_from_nucleus(
    logits_NV: Tensor, temperature_N1: Tensor, top_p_N1: Tensor, uniform_N1: Tensor
) -> Tensor:
    """Inverse of the distribution function, over the likeliest tokens that make up top_p."""
    probs_NV = torch.softmax(logits_NV / temperature_N1, dim=-1)
    probs_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
    cumulative_NV = _cumulative(probs_NV)
    # The nucleus ends with the token whose probability reaches top_p.
    last_N1 = (cumulative_NV < top_p_N1).sum(dim=-1, keepdim=True)
    # Or with the last possible one: rounded, all of them together may fall short of 1.
    last_N1 = torch.minimum(last_N1, (probs_NV > 0).sum(dim=-1, keepdim=True) - 1)
    threshold_N1 = uniform_N1 * cumulative_NV.gather(1, last_N1)
    rank_N1 = (cumulative_NV <= threshold_N1).sum(dim=-1, keepdim=True)
    return order_NV.gather(1, torch.minimum(rank_N1, last_N1))[:, 0]


def _cumulative(probs_NV: Tensor) -> Tensor:
    """The same bits every time: on CUDA torch sums a single row in whatever order comes."""
    rows_NV = probs_NV if len(probs_NV) > 1 else probs_NV.expand(2, -1)
    return rows_NV.cumsum(dim=-1)[: len(probs_NV)]
