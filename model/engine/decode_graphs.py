"""A rank's layers over single tokens, replayed as CUDA graphs: what and when, not how to record.

A decode step of 8 layers is some 300 launches. One H100 computes them in 20 ms; its host gives them
out in 15, in which it could make the masks of the next step. A graph of them is one launch. What is
launched depends on the number of sequences and the width of their block tables alone, so there is
one graph for each such shape that comes up more than a few times.
S sequences of one token each, D hidden size.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from model.decoder import Decoder
from model.layers.dispatch import launches_alone
from model.layers.memory import LayerMemory
from model.layers.ragged import BatchOnHost, RaggedBatch, device_numbers, to_device

logger = logging.getLogger(__name__)

# Of a shape, before it is recorded: they compile its kernels, which cannot be recorded, and most
# shapes are not seen again, as the last sequences of a run end one by one.
_RUNS_BEFORE = 2
# Each keeps some megabytes of the device.
MOST_GRAPHS = 32

Shape = tuple[int, int]  # sequences, blocks of their tables


class Recorder(Protocol):
    """Makes of a computation that reads and writes tensors which stay the same what computes it
    again. Does not compute it meanwhile. Raises whatever keeps it from being recorded."""

    def record(self, compute: Callable[[], object]) -> Callable[[], None]: ...

    def forget(self) -> None:
        """All that was recorded is about to be given up."""
        ...


class DecodeGraphs:
    """Takes hidden states through the layers as `decoder` does, bit for bit.

    most_sequences: of a microbatch. recorder: None computes everything as it is.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: LayerMemory,
        most_sequences: int,
        recorder: Recorder | None,
    ) -> None:
        self._decoder, self._memory = decoder, memory
        self._most_sequences, self._recorder = most_sequences, recorder
        self._hidden_SD: Tensor | None = None  # of all graphs: one of them runs at a time
        self._graphs: OrderedDict[Shape, _Graph] = OrderedDict()  # the newest use last
        self._seen: Counter[Shape] = Counter()

    @torch.inference_mode()
    def __call__(self, hidden_TD: Tensor, batch: BatchOnHost) -> Tensor:
        graph = self._graph(hidden_TD, batch)
        if graph is None:
            return self._decoder(hidden_TD, batch.to(hidden_TD.device), self._memory)
        return graph.replay(hidden_TD, batch)

    def forget(self) -> None:
        """Give the memory of all graphs back."""
        if self._recorder:
            self._recorder.forget()
            self._graphs.clear()
            self._seen.clear()

    def _graph(self, hidden_TD: Tensor, batch: BatchOnHost) -> "_Graph | None":
        if not self._can_record(hidden_TD, batch):
            return None
        shape = batch.sequences, batch.table
        if graph := self._graphs.get(shape):
            self._graphs.move_to_end(shape)
            return graph
        self._seen[shape] += 1
        return self._record(shape, hidden_TD, batch) if self._seen[shape] > _RUNS_BEFORE else None

    def _can_record(self, hidden_TD: Tensor, batch: BatchOnHost) -> bool:
        """Does the host only launch, and the same for all batches of this shape?"""
        if self._recorder is None or batch.sequences != batch.tokens:
            return False
        text = self._decoder.config.text
        widths = (text.hidden_size, text.intermediate_size, text.num_heads * text.head_dim)
        return launches_alone(hidden_TD, text.head_dim, *widths)

    def _record(self, shape: Shape, hidden_TD: Tensor, batch: BatchOnHost) -> "_Graph | None":
        assert self._recorder
        if self._hidden_SD is None:
            self._hidden_SD = hidden_TD.new_empty(self._most_sequences, hidden_TD.shape[1])
        try:
            graph = _Graph(
                self._decoder, self._memory, self._hidden_SD[: batch.sequences], batch,
                self._recorder,
            )  # fmt: skip
        except Exception as error:
            logger.warning(
                "decode goes on without CUDA graphs: %s: %s", type(error).__name__, error
            )
            self.forget()
            self._recorder = None
            return None
        self._graphs[shape] = graph
        if len(self._graphs) > MOST_GRAPHS:
            oldest, _ = self._graphs.popitem(last=False)
            del self._seen[oldest]
        return graph


class _Graph:
    """Of one shape, with the tensors that it reads."""

    def __init__(
        self,
        decoder: Decoder,
        memory: LayerMemory,
        hidden_SD: Tensor,
        batch: BatchOnHost,
        recorder: Recorder,
    ) -> None:
        self._hidden_SD = hidden_SD  # it writes them too
        self._packed = torch.empty(
            device_numbers(batch.columns), dtype=torch.int32, device=hidden_SD.device
        )
        columns = to_device(batch.columns, hidden_SD.device, into=self._packed)

        def compute() -> None:
            # The contexts are those of now. What is launched does not depend on them.
            on_device = RaggedBatch.of_columns(batch.lengths, batch.contexts, columns)
            hidden_SD.copy_(decoder(hidden_SD, on_device, memory))

        self._replay = recorder.record(compute)

    def replay(self, hidden_SD: Tensor, batch: BatchOnHost) -> Tensor:
        self._hidden_SD.copy_(hidden_SD)
        to_device(batch.columns, hidden_SD.device, into=self._packed)
        self._replay()
        return self._hidden_SD.clone()  # the next one may overwrite them before they are read
