"""The losses of a batch and their gradients: computed, or replayed as a CUDA graph.

A batch is some 5,000 small launches. One H100 computes them in 74 ms, its host gives them out in
174; a graph of them is one launch. It is recorded for one layout of pages, of which there are few.
"""

import traceback
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.nano.batches import Batch
from model.nano.losses import Losses

Found = dict[str, Tensor]


class Gradients:
    """Takes a batch in the host's memory, leaves `grad` in the parameters it depends on, and gives
    its losses, which the next batch may overwrite.

    make_losses: given whether to go through torch.compile. What cannot be compiled, or recorded, is
    run as it is from then on: a GPU is lent for minutes, and half the speed is better than none.
    """

    def __init__(
        self,
        make_losses: Callable[[bool], Losses],
        parameters: Sequence[nn.Parameter],
        *,
        compiled: bool,
        recorded: bool,
    ) -> None:
        self._make_losses, self._parameters = make_losses, parameters
        self._losses = make_losses(compiled)
        self._recorded = recorded
        self._seen: set[Hashable] = set()
        self._records: dict[Hashable, _Record] = {}
        self._device = parameters[0].device
        self._memory = torch.cuda.graph_pool_handle() if recorded else None

    def __call__(self, batch: Batch) -> Found:
        layout = batch.layout, batch.asked is None
        if layout in self._records:
            return self._records[layout].replay(batch)
        if self._recorded and layout in self._seen:
            return self._record(layout, batch)
        self._seen.add(layout)  # computed once as it is: what is compiled then is not recorded
        return self._compute(batch)

    def _compute(self, batch: Batch) -> Found:
        try:
            return _losses_and_gradients(self._losses, batch.to(self._device))
        except Exception:
            if not self._losses.compiled:
                raise
            traceback.print_exc()
            print("goes on without torch.compile", flush=True)
            self._losses = self._make_losses(False)
            self._forget_gradients()
            return self._compute(batch)

    def _record(self, layout: Hashable, batch: Batch) -> Found:
        self._forget_gradients()
        try:
            self._records[layout] = _Record(self._losses, batch, self._parameters, self._memory)
        except Exception:
            traceback.print_exc()
            print("goes on without CUDA graphs", flush=True)
            self._recorded = False
            self._forget_gradients()
        return self(batch)

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class _Record:
    """A CUDA graph, with the batch that it reads, and the losses and gradients that it writes. They
    stay; what else it writes is shared with the other graphs, of which one runs at a time."""

    def __init__(
        self, losses: Losses, batch: Batch, parameters: Sequence[nn.Parameter], memory: Any
    ) -> None:
        self._batch = batch.to(parameters[0].device)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on: one pins the memory of the batches to come.
        with torch.cuda.graph(
            self._graph,
            pool=memory,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            self._found = _losses_and_gradients(losses, self._batch)
        self._gradients = [(p, p.grad) for p in parameters]

    def replay(self, batch: Batch) -> Found:
        self._batch.copy_(batch)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._found


def _losses_and_gradients(losses: Losses, batch: Batch) -> Found:
    found = losses(batch)
    found["loss"].backward()
    return {name: value.detach() for name, value in found.items()}
