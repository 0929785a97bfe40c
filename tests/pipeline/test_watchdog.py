"""A replica whose one rank, or the coordinator of several, hangs ends its process, and Ray starts
it again; a slow one goes on."""

import re
import subprocess
import sys
import time

import pytest

from model.nano.random_checkpoint import write_random_checkpoint
from tests.model.engine.troubled_worker import SLOW_SECONDS

pytestmark = pytest.mark.slow

HANG_SECONDS = 4

PROGRAM = """
import json, os, sys, time
import numpy as np
import torch
from model.engine import rank_host
from model.engine.config import EngineConfig
from model.engine.rank import Rank
from model.engine.rank_processes import RankProcesses
from pipeline.replica import Replica
from schemas.requests import Request, Sampling
from tests.model.engine import troubled_worker

checkpoint, hang_seconds, who, way = sys.argv[1:]

def disturb(kind, method, disturbing):
    original = getattr(kind, method)
    calls = []

    def disturbed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            disturbing()
        return original(*arguments)

    setattr(kind, method, disturbed)

def hang():
    time.sleep(3600)

def be_slow():
    troubled_worker._compute_for(troubled_worker.SLOW_SECONDS)

disturbing = {"hang": hang, "slow": be_slow}[way]
if who == "rank":
    disturb(Rank, "forward", disturbing)
elif way == "hang":
    disturb(RankProcesses, "receive", disturbing)
else:
    rank_host.WORKER = troubled_worker.NAME
    os.environ["TROUBLES"] = json.dumps([("slow", 0, 1, "forward", 0, 3)])
ids = np.arange(5, 10, dtype=np.int32)
ranks = 1 if who == "rank" else 2
config = EngineConfig(
    checkpoint, device="cpu", ranks=ranks, threads=1, hang_seconds=int(hang_seconds)
)
replica = Replica(config, ends=lambda why: print(why, flush=True))
requests = [Request(str(n), ids + n, sampling=Sampling(max_new_tokens=20)) for n in range(5)]
answers = [replica.submit(request) for request in requests]
print("started", flush=True)
print(len({answer.result().id for answer in answers}), flush=True)
"""


@pytest.mark.parametrize(
    ("who", "way", "found"),
    [
        ("rank", "hang", "no progress for .* s, is computing microbatch 2"),
        ("rank", "slow", None),
        ("coordinator", "hang", "no progress for .* s, is telling its ranks or hearing them"),
        ("coordinator of a rank that is", "slow", None),
    ],
)
def test_a_replica_that_hangs_ends_and_a_slow_one_goes_on(tmp_path, who, way, found):
    assert SLOW_SECONDS > 3 * HANG_SECONDS
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", tile=56)
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, checkpoint, str(HANG_SECONDS), who, way],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = " ".join(ended.stdout.split())
    if found:
        assert ended.returncode == 1, ended.stderr
        assert re.fullmatch(f"started the engine hung: {found}.*", said)
        assert re.search(f"the engine hangs: {found}; this replica is", ended.stderr)
    else:
        assert (ended.returncode, said) == (0, "started 5"), ended.stderr
        assert time.monotonic() - started > SLOW_SECONDS
