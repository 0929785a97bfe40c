"""Decode steps replayed as CUDA graphs: bit for bit those that are launched one by one.

`python -m pytest -s` prints how long the host takes for a step, and what memory a graph keeps.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.decoder import Decoder
from model.engine import decode_graphs, rank
from model.engine.config import EngineConfig
from model.engine.cuda_recorder import CudaRecorder
from model.engine.decode_graphs import DecodeGraphs
from model.engine.engine import Engine
from model.layers.memory import LayerMemory
from model.layers.ragged import BLOCK_TOKENS, BatchOnHost
from model.layers.states import States
from model.nano.random_checkpoint import write_random_checkpoint
from model.weights.checkpoint import load_decoder
from schemas.requests import Result
from tests.model.engine.conftest import text_request

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
PROMPT = 7 * BLOCK_TOKENS  # decode soon outgrows tables of 8 blocks


class Counting(CudaRecorder):
    def __init__(self) -> None:
        super().__init__(DEVICE)
        self.recorded = self.replayed = 0

    def record(self, compute: Callable[[], object]) -> Callable[[], None]:
        replay = super().record(compute)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(
        tmp_path_factory.mktemp("graphs"), head_dim=128, tile=56, hidden_size=256, experts=4
    )


@pytest.fixture(scope="module", params=["int8", "none"])
def decoder(request, checkpoint) -> Decoder:
    return load_decoder(
        checkpoint, range(8), dtype=torch.bfloat16, device=DEVICE, quantization=request.param
    )


def tensors(memory: torch.Tensor | States) -> tuple[torch.Tensor, ...]:
    return memory.tensors if isinstance(memory, States) else (memory,)


class Twins:
    """The same batches through graphs and without, each with a memory of its own."""

    def __init__(self, decoder: Decoder, recorder: CudaRecorder, sequences: int) -> None:
        self.decoder, self.table = decoder, 16
        how: Any = {"dtype": torch.bfloat16, "device": DEVICE}
        blocks = sequences * self.table
        self.memories = [
            LayerMemory(decoder.config.text, decoder.span, slots=sequences, blocks=blocks, **how)
            for _ in range(2)
        ]
        self.graphs = DecodeGraphs(decoder, self.memories[0], sequences, recorder)
        self.contexts = Counter[int]()
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.seconds: dict[str, list[float]] = {"replayed": [], "launched": []}

    @torch.inference_mode()
    def step(self, slots: list[int], length: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        contexts = [self.contexts[slot] for slot in slots]
        used = [-(-(context + length) // BLOCK_TOKENS) for context in contexts]
        tables = [
            [slot * self.table + i for i in range(count)]
            for slot, count in zip(slots, used, strict=True)
        ]
        batch = BatchOnHost.build([length] * len(slots), contexts, slots, tables)
        size = (batch.tokens, self.decoder.config.text.hidden_size)
        hidden = torch.randn(size, generator=self.generator, device=DEVICE, dtype=torch.bfloat16)
        self.contexts.update(dict.fromkeys(slots, length))
        torch.cuda.synchronize()
        started = time.perf_counter()
        ours = self.graphs(hidden, batch)
        between = time.perf_counter()
        theirs = self.decoder(hidden, batch.to(DEVICE), self.memories[1])
        self.seconds["replayed"].append(between - started)
        self.seconds["launched"].append(time.perf_counter() - between)
        return ours, theirs


def test_every_step_is_that_of_launches_one_by_one(decoder):
    recorder = Counting()
    twins = Twins(decoder, recorder, sequences=6)
    everyone = list(range(6))
    assert torch.equal(*twins.step(everyone, PROMPT))
    given = []
    for step in range(240):
        # Some leave and join: five of six, in another order each time, and now and then one alone.
        slots = everyone if step % 3 == 0 else [(step + i) % 6 for i in range(5)]
        ours, theirs = twins.step([step % 6] if step % 20 == 0 else slots)
        given.append((ours, theirs))
    for step, (ours, theirs) in enumerate(given):
        assert torch.equal(ours, theirs), step
        assert ours.isfinite().all()
    assert max(twins.contexts.values()) > 8 * BLOCK_TOKENS
    assert recorder.recorded >= 4
    assert recorder.replayed > 200
    for name in ("states", "recent", "keys", "values"):
        ours, theirs = (getattr(memory, name) for memory in twins.memories)
        for layer in ours:
            for one, other in zip(tensors(ours[layer]), tensors(theirs[layer]), strict=True):
                assert torch.equal(one, other), (name, layer)
    for way, seconds in twins.seconds.items():
        middle = sorted(seconds[-100:])[50] * 1e3
        print(f"\nhost, 8 layers, a step {way}: {middle:.2f} ms")


def test_a_slot_and_blocks_that_go_to_another_sequence_are_seen_by_graphs(decoder):
    recorder = Counting()
    twins = Twins(decoder, recorder, sequences=3)
    twins.step([0, 1, 2], 64)
    for _ in range(9):
        assert torch.equal(*twins.step([0, 1, 2]))
    twins.contexts[1] = 0  # a new sequence, with a prompt of its own
    twins.step([1], 65)
    # And one that comes back from the host, to other blocks.
    for memory in twins.memories:
        memory.restore(2, range(32, 34), memory.save(0, range(2)))
    twins.contexts[2] = twins.contexts[0]
    for _ in range(20):
        assert torch.equal(*twins.step([0, 1, 2]))
    assert recorder.recorded == 1
    assert recorder.replayed == 27


def test_graphs_make_room_and_give_their_memory_back(decoder, monkeypatch):
    monkeypatch.setattr(decode_graphs, "MOST_GRAPHS", 2)
    recorder = Counting()
    twins = Twins(decoder, recorder, sequences=6)
    twins.step(list(range(6)), PROMPT)
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(2):
        for count in (1, 2, 3, 6):
            for _ in range(4):
                assert torch.equal(*twins.step(list(range(count))))
    assert recorder.recorded == 8
    torch.cuda.empty_cache()
    held = before - torch.cuda.mem_get_info()[0]
    twins.graphs.forget()
    torch.cuda.empty_cache()
    given_back = held - (before - torch.cuda.mem_get_info()[0])
    print(
        f"\n2 graphs of 8 narrow layers keep {held / 2**20:.1f} MiB, give {given_back / 2**20:.1f}"
    )
    for _ in range(4):
        assert torch.equal(*twins.step([0, 1, 2]))
    assert recorder.recorded == 9


def test_what_cannot_be_recorded_leaves_everything_as_it_was():
    recorder = CudaRecorder(DEVICE)
    stream, x = torch.cuda.current_stream(), torch.ones(1000, device=DEVICE)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: (x + 1).sum().item())  # the host would wait
    assert torch.cuda.current_stream() == stream
    assert (x + 1).sum().item() == 2000
    replay = recorder.record(lambda: x.add_(1))
    assert x.sum().item() == 1000
    replay()
    replay()
    assert x.sum().item() == 3000


SCHEMA = json.dumps({"type": "array", "items": {"enum": ["north", "south"]}, "minItems": 20})


def _generate(checkpoint, **settings: Any) -> dict[str, Result]:
    """Free and held, greedy and sampled, of many lengths, so that they end one by one."""
    config = EngineConfig(
        str(checkpoint),
        device="cuda",
        **{"chunk_tokens": 512, "cache_bytes": 2**28, "max_sequences": 12, **settings},
    )
    requests = [
        text_request(
            f"text-{n}",
            40 + 37 * n % 500,
            max_new_tokens=30 + 11 * n % 70,
            temperature=float(n % 2),
            seed=n,
            json_schema=SCHEMA if n % 3 == 0 else None,
        )
        for n in range(30)
    ]
    with Engine(config) as engine:
        return {result.id: result for result in engine.generate(requests)}


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic"])
def test_the_engine_writes_the_same_with_graphs_and_without(checkpoint, monkeypatch, quantization):
    recorders: list[Counting] = []

    def counting(_) -> Counting:
        recorders.append(Counting())
        return recorders[-1]

    monkeypatch.setattr(rank, "recorder_for", counting)
    ours = _generate(checkpoint, quantization=quantization)
    monkeypatch.setattr(rank, "recorder_for", lambda _: None)
    theirs = _generate(checkpoint, quantization=quantization)
    assert ours == theirs
    assert recorders[0].replayed > 30
