"""A rank on each of several GPUs: tokens come, and what befalls one ends none of the others' wait.

The first thing to run where there are several. CPU twins, which say more, are in
tests/model/engine: here it is NCCL that waits, streams that are ahead, and graphs on every rank.
On one GPU the ranks share it, and all but NCCL is tested.
"""

import os
import signal
import time
from operator import sub
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import load_config
from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.engine.rank_host import Hosts, ThisHost
from model.nano.random_checkpoint import write_random_checkpoint
from schemas.errors import EngineError
from schemas.requests import Request
from tests.model.engine.conftest import make_request, text_request, token_ids, trouble
from tests.model.engine.test_rank_processes import gone

GPUS = torch.cuda.device_count()
RANKS = min(4, GPUS) if GPUS > 1 else 4
SETTINGS: Any = {"device": "cuda", "dtype": "bfloat16", "chunk_tokens": 256, "cache_bytes": 2**28}
SECONDS_TO_DIE = 15  # of processes that hold memory of GPUs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs a CUDA device")]
__all__ = ["trouble"]  # a fixture


@pytest.fixture(autouse=True)
def linked_through_host_where_ranks_share_a_gpu(monkeypatch, trouble) -> None:
    if GPUS == 1:
        monkeypatch.setenv("THROUGH_HOST", "1")
        trouble()  # none, but by the worker that reads this


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_random_checkpoint(folder, head_dim=128, tile=56, hidden_size=256, experts=4)


@pytest.fixture(scope="module")
def requests(checkpoint) -> list[Request]:
    """As many at a time that all ranks have some, of lengths at which decode steps are recorded."""
    model = load_config(checkpoint)
    texts = [text_request(f"text-{n}", 20 + n, max_new_tokens=60) for n in range(24)]
    return [make_request(model, seed) for seed in range(6)] + texts


def _engine(checkpoint: Path, **settings: Any) -> Engine:
    config = EngineConfig(str(checkpoint), ranks=RANKS, **SETTINGS, **settings)
    shared = Hosts("127.0.0.1", [ThisHost(gpu=0)] * RANKS)
    return Engine(config, shared if GPUS == 1 else None)


def _free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(min(RANKS, GPUS))]


def test_every_rank_decodes_by_graphs_and_the_same_requests_get_the_same_tokens(
    checkpoint, requests, capfd
):
    with _engine(checkpoint) as engine:
        first, second = (token_ids(list(engine.generate(requests))) for _ in range(2))
        time.sleep(2)  # until all have told how long they computed
        engine.step()
        assert all(engine.rank_busy_seconds)
    assert first == second
    assert first.keys() == {request.id for request in requests}
    assert "without CUDA graphs" not in capfd.readouterr().err


def test_a_rank_that_is_killed_ends_those_that_wait_for_it_and_all_gpus_are_free_again(
    checkpoint, requests
):
    _free_bytes()  # takes some itself, for a context on each
    before = _free_bytes()
    with _engine(checkpoint) as engine:
        list(engine.generate(requests))
        for request in requests:
            engine.add(request)
        engine.step()
        pids, victim = engine.rank_pids, RANKS - 2
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(EngineError, match=rf"^rank {victim} of {RANKS} .*was killed by SIGKIL"):
            list(engine.generate([]))
        assert time.monotonic() - killed < SECONDS_TO_DIE
    assert gone(pids, within=1.0)
    while (taken := max(map(sub, before, _free_bytes()))) > 2**26:
        assert time.monotonic() - killed < 2 * SECONDS_TO_DIE, f"{taken} bytes are not given back"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("trouble_met", "said"),
    [
        (("stuck", 0, 1, "forward", 0, 3), r"^rank 1 of \d .*hangs: no progress for \d+ s"),
        (("lost", 0, 0, "send", 0, None), r"hangs: no progress for \d+ s"),
    ],
    ids=["a host that never goes on", "hidden states that never arrive"],
)
def test_what_never_ends_is_noticed_while_nccl_waits(
    checkpoint, requests, trouble, trouble_met, said
):
    trouble(trouble_met)
    with _engine(checkpoint, hang_seconds=10) as engine:
        pids = engine.rank_pids
        with pytest.raises(EngineError, match=said):
            list(engine.generate(requests))
    assert gone(pids, within=1.0)


@pytest.mark.parametrize("rank", sorted({0, 1, RANKS - 1}))
def test_a_rank_that_is_out_of_memory_leaves_nobody_waiting(checkpoint, requests, trouble, rank):
    trouble(("memory", 0, rank, "forward", 0, 3))
    with _engine(checkpoint) as engine:
        answers = token_ids(list(engine.generate(requests)))
    assert answers.keys() == {request.id for request in requests}
