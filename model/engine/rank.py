"""What one rank does with a microbatch: its layers, its memory, on one device.

Knows neither its neighbours nor how it is reached; the same in a process of its own or not.
Shapes: T tokens of a microbatch, D hidden size, N sequences that get a token, P image tokens.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import load_config
from model.decoder import Decoder, check_image_tokens
from model.engine.config import EngineConfig
from model.engine.cuda_recorder import recorder_for
from model.engine.decode_graphs import DecodeGraphs
from model.engine.mask_memory import MaskMemory
from model.engine.memory import Capacity, Room
from model.engine.microbatch import (
    ON_DEVICE,
    Image,
    Microbatch,
    SampledOnDevice,
    batch_of,
    last_rows,
    rows_of,
)
from model.engine.plan import Plan
from model.engine.ranks import layer_spans
from model.engine.rehearsal import measure_room
from model.engine.sampling import Masks, choose
from model.layers.dispatch import packs_states
from model.layers.memory import LayerMemory, SavedSequence, block_bytes, slot_bytes
from model.layers.ragged import to_device
from model.weights.checkpoint import load_decoder
from model.weights.random import random_decoder

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Scored:
    """A microbatch of which only the choice of tokens is left. logits_NV: None without draws.
    slots_N: int64, whose tokens they will be."""

    microbatch: Microbatch
    logits_NV: Tensor | None
    slots_N: Tensor


class Rank:
    """The span of layers with index `rank` of `config.ranks`, loaded on `device` and ready for
    `allocate`. at: is told in words how far the loading is."""

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        device: torch.device,
        at: Callable[[str], None],
    ) -> None:
        self._config = config
        self.device = device
        self.dtype = config.torch_dtype
        self.decoder = _load(config, rank, device, at)
        self._features: dict[int, Tensor] = {}  # sequence -> the features not yet used, [P, D]
        self._saved: dict[int, SavedSequence] = {}
        self.mask_memory = MaskMemory(device)

    def room(self) -> Room:
        """Memory for slots and blocks."""
        text, span = self.decoder.config.text, self.decoder.span
        budget = self._config.cache_bytes or _CPU_CACHE_BYTES
        if self.device.type == "cuda":
            free = measure_room(self.decoder, self.device, self._config)
            budget = min(self._config.cache_bytes or free, free)
        packed = packs_states(self.dtype, self.device, text.head_dim)
        return Room(
            budget=budget,
            slot_bytes=slot_bytes(text, span, self.dtype, packed=packed),
            block_bytes=block_bytes(text, span, self.dtype),
        )

    def allocate(self, capacity: Capacity) -> None:
        self._memory = LayerMemory(
            self.decoder.config.text,
            self.decoder.span,
            slots=capacity.slots,
            blocks=capacity.blocks,
            dtype=self.dtype,
            device=self.device,
        )
        self._layers = DecodeGraphs(
            self.decoder, self._memory, capacity.slots, recorder_for(self.device)
        )
        self._last_tokens_S = torch.zeros(capacity.slots, dtype=torch.int64, device=self.device)

    def take_image(self, image: Image) -> None:
        """First rank: compute an image's features and keep them until its prompt has used them."""
        # Pinned, or the host would wait for the device. A copy, since the tiles may be read-only.
        on_cuda = self.device.type == "cuda"
        tiles_NHWC = torch.empty(image.tiles.shape, dtype=torch.uint8, pin_memory=on_cuda)
        tiles_NHWC.numpy()[...] = image.tiles
        self._features[image.sequence] = self.decoder.image_features(tiles_NHWC, image.size)

    def swap(self, plan: Plan) -> None:
        """Save preempted sequences to the host, then restore resumed ones."""
        for swap in plan.saves:
            self._saved[swap.sequence] = self._memory.save(swap.slot, swap.blocks)
        for swap in plan.restores:
            self._memory.restore(swap.slot, swap.blocks, self._saved.pop(swap.sequence))

    def forget(self) -> None:
        """All sequences; a new one finds slots and blocks as if they had never been used."""
        self._features.clear()
        self._saved.clear()
        self._layers.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def embed(self, microbatch: Microbatch) -> Tensor:
        """First rank: hidden_TD of the microbatch's tokens and image features."""
        placed = self._place_features(microbatch)
        check_image_tokens(microbatch.token_ids, placed, self.decoder.config.image_token_id)
        return self.decoder.embed(self._token_ids(microbatch), placed)

    def forward(self, hidden_TD: Tensor, plan: Plan) -> Tensor:
        """This rank's layers, which write to its memory."""
        return self._layers(hidden_TD, batch_of(plan))

    def score(self, hidden_TD: Tensor, microbatch: Microbatch) -> Scored:
        """Last rank: what can be computed of the next tokens before their masks are known."""
        rows_N, slots_N = last_rows(microbatch.plan, self.device)
        logits_NV = self.decoder.logits(hidden_TD[rows_N]) if microbatch.draws else None
        return Scored(microbatch, logits_NV, slots_N)

    def sample(self, scored: Scored, masks: Masks | None = None) -> SampledOnDevice:
        """Last rank: choose the next tokens; with masks, where the microbatch is constrained."""
        number = scored.microbatch.plan.number
        assert scored.microbatch.constrained == (masks is not None)
        assert masks is None or masks.number == number
        if scored.logits_NV is None:
            nothing = torch.empty(0)
            return SampledOnDevice(number, nothing, nothing)
        on_device = self.mask_memory.upload(masks) if masks else None
        tokens_N, logprobs_N = choose(scored.logits_NV, scored.microbatch.draws, on_device)
        self._last_tokens_S[scored.slots_N] = tokens_N
        return SampledOnDevice(number, tokens_N, logprobs_N)

    def _place_features(self, microbatch: Microbatch) -> list[tuple[int, Tensor]]:
        """The image features that this microbatch uses, each with the row where it begins."""
        is_image_T = microbatch.token_ids == self.decoder.config.image_token_id
        if not is_image_T.any():
            return []
        placed = []
        for segment, rows in zip(microbatch.plan.segments, rows_of(microbatch.plan), strict=True):
            places = np.flatnonzero(is_image_T[rows.start : rows.stop])
            if len(places):
                features_PD = self._next_features(segment.sequence, len(places))
                placed.append((rows.start + int(places[0]), features_PD))
        return placed

    def _token_ids(self, microbatch: Microbatch) -> Tensor:
        """int64 [T] on the device, with the tokens that only the device knows."""
        rows = np.flatnonzero(microbatch.token_ids == ON_DEVICE)
        # They are single tokens of decoding segments, which come first: row i is segment i.
        slots = [microbatch.plan.segments[row].slot for row in rows]
        ids_T, rows_N, slots_N = (
            column.long() for column in to_device([microbatch.token_ids, rows, slots], self.device)
        )
        if len(rows):
            ids_T[rows_N] = self._last_tokens_S[slots_N]
        return ids_T

    def _next_features(self, sequence: int, count: int) -> Tensor:
        features_PD = self._features.pop(sequence)
        if len(features_PD) > count:
            self._features[sequence] = features_PD[count:]
        return features_PD[:count]


def _load(
    config: EngineConfig, rank: int, device: torch.device, at: Callable[[str], None]
) -> Decoder:
    model = load_config(config.checkpoint)
    span = layer_spans(model, config.ranks)[rank]
    who = f"rank {rank} of {config.ranks}"
    logger.info("%s: loading layers %d to %d on %s", who, span.start, span.stop - 1, device)
    started = time.monotonic()
    how: Any = {
        "dtype": config.torch_dtype,
        "device": device,
        "quantization": config.quantization,
    }
    if config.random_weights:
        decoder = random_decoder(model, span, **how)
    else:

        def loaded(share: float) -> None:
            at(f"loading its layers, {share:.0%}")

        decoder = load_decoder(config.checkpoint, span, **how, loaded=loaded)
    if device.type == "cuda":
        at("computing a trial microbatch")
    logger.info("%s: loaded in %.0f s", who, time.monotonic() - started)
    return decoder
