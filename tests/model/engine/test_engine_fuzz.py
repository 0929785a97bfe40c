"""The engine on requests, memory, ranks and moments drawn at random: each request is answered once,
with the tokens, log-probabilities and text that it gets alone and slowly, bit for bit.

VL01_FUZZ=1000:2000 in the environment draws other cases than those that every run looks at.
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch

from model.config import load_config
from model.decoder import Decoder
from model.engine import config as config_module
from model.engine import engine as engine_module
from model.engine import rank as rank_module
from model.engine import rank_in_process, repetition, scheduler, sequence
from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.engine.memory import Capacity
from model.engine.plan import Plan
from model.engine.rank import Rank
from model.engine.rank_in_process import RankInProcess
from model.layers import lightning_attention, memory, ragged, softmax_attention
from model.nano.random_checkpoint import write_random_checkpoint
from model.tokenizer import Tokenizer
from schemas.errors import RowError
from schemas.requests import Request, Result
from tests.model.engine import conftest
from tests.model.engine.alone import REPEATS, STRIDE, Alone
from tests.model.engine.ranks_in_line import RanksInLine
from tests.model.engine.test_decode_graphs import Again, record_on_cpu

CASES = range(*map(int, os.environ.get("VL01_FUZZ", "0:20").split(":")))

# Of 64 tokens, sequences would have to be long to outgrow several.
BLOCK = 16
_WITH_BLOCKS = (
    *(config_module, engine_module, scheduler, sequence, conftest),
    *(ragged, memory, lightning_attention, softmax_attention),
)


@pytest.fixture(autouse=True, scope="module")
def _small_grains():
    with pytest.MonkeyPatch.context() as patch:
        for module in _WITH_BLOCKS:
            patch.setattr(module, "BLOCK_TOKENS", BLOCK)
        patch.setattr(scheduler, "_LEAST_SHARE", BLOCK)
        patch.setattr(ragged, "_LEAST_TABLE", 1)
        patch.setattr(repetition, "STRIDE", STRIDE)
        patch.setattr(repetition, "_LENGTHS", tuple(REPEATS.items()))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A softmax layer between two of the other kind; a text ends after some 60 tokens."""
    folder = write_random_checkpoint(
        tmp_path_factory.mktemp("fuzz"),
        seed=5,
        layers=3,
        softmax_every=2,
        tile=28,
        hidden_size=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        experts=3,
        intermediate_size=32,
        vocab_size=640,
        vision_layers=1,
        vision_hidden_size=16,
        vision_intermediate_size=16,
    )
    (end,) = load_config(folder).eos_token_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 100, 200]}))
    return folder


@pytest.fixture(scope="module")
def loaded() -> Callable[..., Decoder]:
    """What Rank loads, each span once: no engine changes its weights."""
    original = rank_module._load
    load = cache(lambda config, rank, device: original(config, rank, device, lambda _: None))
    return lambda config, rank, device, at: load(config, rank, device)


@pytest.fixture(scope="module")
def alone(checkpoint) -> Alone:
    decoder = rank_module._load(_plain(checkpoint, 1), 0, torch.device("cpu"), lambda _: None)
    return Alone(decoder, Tokenizer.from_checkpoint(checkpoint), prompts=24)


def _plain(checkpoint: Path, ranks: int) -> EngineConfig:
    return EngineConfig(str(checkpoint), device="cpu", ranks=ranks, quantization="none")


@dataclass(frozen=True)
class Case:
    """One engine. late: its ranks compute as late as a dice says; several always do so.
    graphs: single tokens are recorded and replayed. shortages: how often memory runs out."""

    config: EngineConfig
    capacity: Capacity
    late: bool
    graphs: bool
    shortages: int

    @classmethod
    def draw(cls, rng: random.Random, checkpoint: Path) -> "Case":
        config = EngineConfig(
            str(checkpoint),
            device="cpu",
            ranks=rng.choice([1, 1, 2, 3]),
            ahead=rng.random() < 0.6,
            chunk_tokens=rng.choice([32, 33, 48, 50, 64, 80, 128, 1024]),
        )
        return cls(
            config,
            Capacity(slots=rng.choice([1, 3, 4, 5, 7]), blocks=rng.choice([*range(6, 11), 60])),
            late=config.ranks > 1 or rng.random() < 0.5,
            graphs=rng.random() < 0.5,
            shortages=rng.choice([0, 0, 1]) * (config.chunk_tokens >= 4 * BLOCK),
        )


Start = Callable[[Case, random.Random], Engine]


@pytest.fixture
def start(monkeypatch, checkpoint, loaded, alone) -> Start:
    def start(case: Case, rng: random.Random) -> Engine:
        def in_line(config: EngineConfig, *_: object) -> RanksInLine:
            return RanksInLine(config, case.capacity, rng)

        if case.late:
            monkeypatch.setattr(engine_module, "RankInProcess", in_line)
        monkeypatch.setattr(engine_module, "RankProcesses", in_line)
        monkeypatch.setattr(rank_in_process, "share_out", lambda *_: case.capacity)
        monkeypatch.setattr(engine_module.Tokenizer, "from_checkpoint", lambda _: alone.tokenizer)
        monkeypatch.setattr(
            rank_module,
            "_load",
            lambda config, *which: loaded(_plain(checkpoint, config.ranks), *which),
        )
        monkeypatch.setattr(Rank, "forward", _short_of_memory(case.shortages, rng))
        if case.graphs:
            record_on_cpu(monkeypatch, Again)
        return Engine(case.config)

    return start


def _short_of_memory(times: int, rng: random.Random) -> Callable[..., torch.Tensor]:
    """Rank.forward, after which memory runs out so often, when layers have changed their states."""
    compute, fails, calls = Rank.forward, set(rng.sample(range(1, 40), times)), count(1)

    def forward(self: Rank, hidden_TD: torch.Tensor, plan: Plan) -> torch.Tensor:
        hidden_TD = compute(self, hidden_TD, plan)
        if next(calls) in fails:
            raise torch.OutOfMemoryError("injected")
        return hidden_TD

    return forward


@pytest.mark.parametrize("seed", CASES)
def test_each_request_is_answered_once_and_as_if_it_were_alone(seed, checkpoint, alone, start):
    rng = random.Random(seed)
    case = Case.draw(rng, checkpoint)
    requests = {str(n): alone.draw(rng, str(n)) for n in range(rng.randint(1, 12))}
    fits = {id for id, each in requests.items() if _blocks(each) <= case.capacity.blocks}
    engine = start(case, rng)
    results = _answer(engine, list(requests.values()), fits, rng)
    assert sorted(result.id for result in results) == sorted(fits)
    for result in results:
        assert result == alone.result(requests[result.id]), case
    _check_nothing_is_left(engine)


def _answer(
    engine: Engine, requests: list[Request], fits: set[str], rng: random.Random
) -> list[Result]:
    results, patience = [], rng.choice([0.0, 0.5, 0.9])
    while requests or engine.unfinished:
        if not requests or (engine.unfinished and rng.random() < patience):
            results += engine.step()
        elif requests[-1].id in fits:
            engine.add(requests.pop())
        else:
            with pytest.raises(RowError, match="the engine's memory holds"):
                engine.add(requests.pop())
    return results


def _blocks(request: Request) -> int:
    """Of all tokens that may be computed: the last one written is not."""
    tokens = len(request.token_ids) + request.sampling.max_new_tokens - 1
    return -(-tokens // BLOCK)


def _check_nothing_is_left(engine: Engine) -> None:
    assert isinstance(engine._ranks, (RanksInLine, RankInProcess))
    while engine._in_flight:  # planned ahead of an answer's end
        assert engine.step() == []
    assert engine.step() == []
    assert not engine._live
    assert not engine._unmasked
    assert engine._scheduler.unfinished == 0
    assert sorted(engine._memory._slots) == list(range(engine.capacity.slots))
    assert sorted(engine._memory._blocks) == list(range(engine.capacity.blocks))
    ranks = engine._ranks
    for rank in ranks.ranks if isinstance(ranks, RanksInLine) else [ranks._open_rank]:
        assert not rank._features
        assert not rank._saved
