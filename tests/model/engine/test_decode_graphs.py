"""Decode steps by graphs, recorded and replayed by a stand-in: the tokens of computing each step.

The stand-in computes again what it recorded, on the same tensors, whatever they hold by then. What
a graph of CUDA does with the same is in tests/gpu/test_decode_graphs.py.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model.engine import decode_graphs, rank
from model.engine.config import EngineConfig
from model.engine.decode_graphs import DecodeGraphs, Recorder
from model.engine.engine import Engine
from model.engine.rank import Rank
from model.layers import ragged
from model.layers.memory import LayerMemory
from model.layers.ragged import BatchOnHost, RaggedBatch
from tests.model.engine.conftest import generate_slowly, text_request, tight_memory, token_ids


class Again:
    """A Recorder for a CPU."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.forgotten = 0
        self.fails = False

    def record(self, compute: Callable[[], object]) -> Callable[[], None]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            compute()

        return replay

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def again(monkeypatch) -> Again:
    recorder = Again()
    record_on_cpu(monkeypatch, lambda: recorder)
    monkeypatch.setattr(ragged, "_LEAST_TABLE", 1)  # so that short texts outgrow it
    return recorder


def record_on_cpu(monkeypatch, recorder_for_rank: Callable[[], Recorder | None]) -> None:
    of_columns = RaggedBatch.of_columns

    def with_contexts_of_the_device(lengths, _, columns):
        # The plain layers go by those of the host, which are of the day a graph was recorded.
        return of_columns(lengths, tuple(columns[2].tolist()), columns)

    monkeypatch.setattr(RaggedBatch, "of_columns", with_contexts_of_the_device)
    monkeypatch.setattr(decode_graphs, "launches_alone", lambda *_: True)
    monkeypatch.setattr(rank, "recorder_for", lambda _: recorder_for_rank())


def _config(checkpoint, **settings: Any) -> EngineConfig:
    return EngineConfig(str(checkpoint), device="cpu", **{"max_sequences": 32, **settings})


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("chunk_tokens", [128, 16384])
def test_texts_are_those_of_the_slow_twin_while_others_join_and_leave(
    checkpoint, requests, expected, again, ahead, chunk_tokens
):
    results, waiting = [], list(requests)
    with Engine(_config(checkpoint, ahead=ahead, chunk_tokens=chunk_tokens)) as engine:
        while waiting or engine.unfinished:
            if waiting and engine.statistics.microbatches % 9 == 0:
                engine.add(waiting.pop())
            results += engine.step()
    assert token_ids(results) == expected
    assert again.recorded > 1
    assert again.replayed > 20


def test_a_preempted_sequence_goes_on_as_before_in_the_blocks_it_comes_back_to(
    checkpoint, decoder, model, again
):
    growing = [
        text_request(f"growing-{n}", 50 + n, max_new_tokens=90, temperature=1.0, seed=n)
        for n in range(5)
    ]
    settings = tight_memory(model, range(model.text.num_layers), slots=4, blocks=7)
    with Engine(_config(checkpoint, **settings)) as engine:
        results = token_ids(list(engine.generate(growing)))
        assert engine.statistics.preemptions > 0
    assert results == {request.id: generate_slowly(decoder, request) for request in growing}
    assert again.replayed > 50


def test_what_cannot_be_recorded_is_computed_as_it_is_and_said_once(
    checkpoint, requests, expected, again, caplog
):
    again.fails = True
    with Engine(_config(checkpoint)) as engine:
        assert token_ids(list(engine.generate(requests))) == expected
    assert caplog.text.count("decode goes on without CUDA graphs: RuntimeError: operation") == 1
    assert again.replayed == 0


def test_graphs_go_with_the_memory_that_a_gpu_lacks_and_are_recorded_anew(
    checkpoint, requests, expected, again, monkeypatch
):
    forward, calls = Rank.forward, Counter()

    def fail_once(self, hidden_TD, plan):
        calls["all"] += 1
        if calls["all"] == 30:
            calls["recorded before"] = again.recorded
            raise torch.OutOfMemoryError("injected")
        return forward(self, hidden_TD, plan)

    monkeypatch.setattr(Rank, "forward", fail_once)
    with Engine(_config(checkpoint)) as engine:
        assert token_ids(list(engine.generate(requests))) == expected
    assert again.forgotten == 1
    assert 0 < calls["recorded before"] < again.recorded


class _Twins:
    """The same batches through graphs and without, each with a memory of its own."""

    def __init__(self, decoder, recorder, sequences: int, blocks: int) -> None:
        self.decoder, self.table = decoder, blocks // sequences
        self.memories = [
            LayerMemory(
                decoder.config.text,
                decoder.span,
                slots=sequences,
                blocks=blocks,
                dtype=torch.float32,
                device="cpu",
            )
            for _ in range(2)
        ]
        self.graphs = DecodeGraphs(decoder, self.memories[0], sequences, recorder)
        self.contexts = Counter[int]()
        self.generator = torch.Generator().manual_seed(0)

    def step(self, slots: list[int], length: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        contexts = [self.contexts[slot] for slot in slots]
        used = [-(-(context + length) // ragged.BLOCK_TOKENS) for context in contexts]
        tables = [
            [slot * self.table + i for i in range(count)]
            for slot, count in zip(slots, used, strict=True)
        ]
        batch = BatchOnHost.build([length] * len(slots), contexts, slots, tables)
        size = (batch.tokens, self.decoder.config.text.hidden_size)
        hidden = torch.randn(size, generator=self.generator)
        self.contexts.update(dict.fromkeys(slots, length))
        return self.graphs(hidden, batch), self.decoder(hidden, batch.to("cpu"), self.memories[1])


def test_every_step_is_that_of_the_layers_as_contexts_outgrow_their_tables(decoder, again):
    twins = _Twins(decoder, again, sequences=3, blocks=12)
    given = []
    for step in range(200):
        slots = [[0, 1, 2], [2, 0], [1]][step % 3]
        replayed, computed = twins.step(slots)
        assert torch.equal(replayed, computed), step
        given.append((replayed, computed))
    assert again.recorded == 8  # tables of 1 and 2 blocks, and of 4 for two of the numbers
    assert again.replayed > 150
    # What was handed out is not overwritten by steps after it.
    assert all(torch.equal(*pair) for pair in given)
    for ours, theirs in zip(*(m.states.values() for m in twins.memories), strict=True):
        assert torch.equal(ours.data_SHKV, theirs.data_SHKV)


def test_a_shape_is_recorded_once_it_has_been_seen_a_few_times(decoder, again):
    twins = _Twins(decoder, again, sequences=2, blocks=8)
    for step in range(5):
        twins.step([0, 1])
        assert (again.recorded, again.replayed) == ((1, step - 1) if step > 1 else (0, 0))


def test_prompts_are_never_recorded(decoder, again):
    twins = _Twins(decoder, again, sequences=2, blocks=8)
    for _ in range(5):
        twins.step([0, 1], length=16)
    assert again.recorded == again.replayed == 0


def test_nothing_is_recorded_where_the_host_waits_for_layers(decoder, again, monkeypatch):
    monkeypatch.setattr(decode_graphs, "launches_alone", lambda *_: False)
    twins = _Twins(decoder, again, sequences=2, blocks=8)
    for _ in range(5):
        twins.step([0, 1])
    assert again.recorded == again.replayed == 0


def test_the_graph_that_was_not_used_for_longest_makes_room(decoder, again, monkeypatch):
    monkeypatch.setattr(decode_graphs, "MOST_GRAPHS", 2)
    twins = _Twins(decoder, again, sequences=3, blocks=6)
    one, two, three = [0], [0, 1], [0, 1, 2]
    for slots in (one, two):
        for _ in range(3):
            twins.step(slots)
    twins.step(one)
    assert again.recorded == 2
    for _ in range(3):
        twins.step(three)  # in the place of two, which was used before one
    assert again.recorded == 3
    before = again.replayed
    twins.step(one)
    assert again.replayed == before + 1
    for _ in range(2):
        assert torch.equal(*twins.step(two))
    assert (again.recorded, again.replayed) == (3, before + 1)
    assert torch.equal(*twins.step(two))
    assert (again.recorded, again.replayed) == (4, before + 2)
