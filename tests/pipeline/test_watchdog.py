"""A replica whose one rank hangs ends its process, and Ray starts it again; a slow one goes on."""

import subprocess
import sys
import time

import pytest

from model.nano.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.slow

HANG_SECONDS = 4

PROGRAM = """
import sys, time
import numpy as np
import torch
from model.engine.config import EngineConfig
from model.engine.rank import Rank
from pipeline.replica import Replica
from schemas.requests import Request, Sampling

checkpoint, hang_seconds, seconds, way = sys.argv[1:]
forward = Rank.forward

def disturbed(self, hidden_TD, plan):
    until = time.monotonic() + float(seconds)
    x = torch.ones(300, 300)
    while plan.number == 2 and time.monotonic() < until:
        if way == "sleep":
            time.sleep(1)
        else:
            x = x @ x / 300
    return forward(self, hidden_TD, plan)

Rank.forward = disturbed
ids = np.arange(5, 10, dtype=np.int32)
replica = Replica(EngineConfig(checkpoint, device="cpu", hang_seconds=int(hang_seconds)))
requests = [Request(str(n), ids + n, sampling=Sampling(max_new_tokens=20)) for n in range(5)]
answers = [replica.submit(request) for request in requests]
print("started", flush=True)
print(len({answer.result().id for answer in answers}), flush=True)
"""


@pytest.mark.parametrize(
    ("seconds", "way", "code", "said"),
    [(3600, "sleep", 1, "started"), (3 * HANG_SECONDS, "compute", 0, "started 5")],
    ids=["hangs", "slow"],
)
def test_a_replica_that_hangs_ends_and_a_slow_one_goes_on(tmp_path, seconds, way, code, said):
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tile=56)
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, checkpoint, str(HANG_SECONDS), str(seconds), way],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, " ".join(ended.stdout.split())) == (code, said), ended.stderr
    if code:
        assert "the engine hangs: no progress for" in ended.stderr
        assert "is computing microbatch 2" in ended.stderr
    else:
        assert time.monotonic() - started > seconds
