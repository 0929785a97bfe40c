"""Records what is launched on a GPU, to be launched again at once. Knows not what it computes."""

from collections.abc import Callable
from contextlib import suppress

import torch


def recorder_for(device: torch.device) -> "CudaRecorder | None":
    return CudaRecorder(device) if device.type == "cuda" else None


class CudaRecorder:
    """A Recorder, by CUDA graphs. They compute in the same memory, and so one after the other: they
    are to be replayed on one stream, whatever it is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # the default one cannot be recorded
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], object]) -> Callable[[], None]:
        """Waits for the GPU, and gives it back what memory nobody uses, before it records."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads go on: NCCL's asks after its events all the time.
            with torch.cuda.graph(
                graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
            ):
                compute()
        except Exception:
            self._clear_away(graph)
            raise
        finally:
            torch.cuda.set_stream(current)  # torch goes back to it only if all went well
        return graph.replay

    def forget(self) -> None:
        """All that was recorded is about to be given up; waits until none of it is computed."""
        torch.cuda.synchronize(self._device)
        self._memory = torch.cuda.graph_pool_handle()  # one without graphs cannot be used again

    def _clear_away(self, graph: torch.cuda.CUDAGraph) -> None:
        """torch's allocator, which asks the graph, takes a recording that fails for one that never
        ends, and frees nothing meanwhile."""
        self._failed = graph
        with suppress(RuntimeError):  # where it did end
            torch._C._cuda_endAllocateToPool(self._device.index, self._memory)
        self._memory = torch.cuda.graph_pool_handle()  # this one counts as in use for good
