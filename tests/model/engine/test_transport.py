"""Ranks that cannot reach each other say so when they start, not in the first microbatch."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

START = """
import sys
from datetime import timedelta
from pathlib import Path

import torch
from model.engine import transport

rank, ranks, meeting_point, seconds = sys.argv[1:5]
transport._TO_LINK = timedelta(seconds=float(seconds))
if "mute" in sys.argv:
    transport.Transport._link = lambda *_: __import__("time").sleep(60)
point = Path(meeting_point)
made = transport.Transport(int(rank), int(ranks), torch.device("cpu"), point)
if int(rank):
    x = made.receive(2, 3, torch.float32)
    assert x.tolist() == [[int(rank)] * 3] * 2, x
if int(rank) + 1 < int(ranks):
    made.send(torch.full((2, 3), int(rank) + 1.0))
    made._sends.popleft()[0].wait()
"""


def _start(rank: int, ranks: int, tmp_path, seconds: int, *how: str) -> subprocess.Popen:
    arguments: Sequence[object] = (rank, ranks, tmp_path / "meeting", seconds, *how)
    return subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("ranks", [2, 5])
def test_what_made_the_links_is_not_taken_for_hidden_states(ranks, tmp_path):
    processes = [_start(rank, ranks, tmp_path, 60) for rank in range(ranks)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert not process.returncode, errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_neighbour_is_never_heard_of_says_so_when_it_starts(rank, tmp_path):
    mute = _start(1 - rank, 2, tmp_path, 60, "mute")
    try:
        process = _start(rank, 2, tmp_path, 1)
        _, errors = process.communicate(timeout=60)
    finally:
        mute.kill()
        mute.communicate()
    assert process.returncode
    assert f"EngineError: rank {rank} of 2 has no link to its neighbours" in errors
