"""How recording is begun and ended, without a GPU: torch.cuda is played by a record of its calls.

What it records is tested in tests/gpu/test_decode_graphs.py.
"""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from model.engine.cuda_recorder import CudaRecorder, recorder_for


class Played:
    """of: the stream that is current."""

    def __init__(self) -> None:
        self.current, self.pools, self.calls = "default", 0, []
        self.fails_at_the_end = False

    @contextmanager
    def graph(self, graph: Any, *, pool: int, stream: str, capture_error_mode: str):
        before, self.current = self.current, stream
        self.calls.append(("begin", pool, capture_error_mode))
        yield
        if self.fails_at_the_end:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.calls.append(("end", pool))
        self.current = before

    def end_allocate(self, index: int, pool: int) -> None:
        if ("end", pool) in self.calls:
            raise RuntimeError("not currently recording to mempool_id")
        self.calls.append(("freed", index, pool))

    def pool(self) -> int:
        self.pools += 1
        return self.pools


@pytest.fixture
def played(monkeypatch) -> Played:
    cuda = Played()

    class Graph:
        replay = staticmethod(lambda: cuda.calls.append("replay"))

    for name, part in {
        "Stream": lambda device: f"of {device}",
        "graph_pool_handle": cuda.pool,
        "CUDAGraph": Graph,
        "current_stream": lambda _: cuda.current,
        "set_stream": lambda stream: setattr(cuda, "current", stream),
        "graph": cuda.graph,
        "synchronize": lambda device: cuda.calls.append(("waited", str(device))),
    }.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate, raising=False)
    return cuda


@pytest.fixture
def recorder(played) -> CudaRecorder:
    return CudaRecorder(torch.device("cuda", 3))


def test_it_records_beside_other_threads_and_on_a_stream_of_its_own(played, recorder):
    streams = []
    replay = recorder.record(lambda: streams.append(played.current))
    assert streams == ["of cuda:3"]
    assert played.current == "default"
    replay()
    assert played.calls == [("begin", 1, "thread_local"), ("end", 1), "replay"]


def test_a_recording_that_fails_leaves_the_stream_and_the_allocator_as_they_were(played, recorder):
    played.fails_at_the_end = True
    with pytest.raises(RuntimeError, match="operation failed"):
        recorder.record(lambda: None)
    assert played.current == "default"
    assert played.calls[-1] == ("freed", 3, 1)


def test_memory_given_up_is_not_recorded_to_again(played, recorder):
    recorder.record(lambda: None)
    recorder.forget()
    recorder.record(lambda: None)
    assert played.calls[2:] == [("waited", "cuda:3"), ("begin", 2, "thread_local"), ("end", 2)]


def test_nothing_is_recorded_on_a_cpu():
    assert recorder_for(torch.device("cpu")) is None
