"""Ranks in processes of their own: the same tokens, and no hang or orphan when one dies."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from model.engine.channel import Door, knock
from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.engine.memory import Capacity
from model.engine.microbatch import Microbatch
from model.engine.plan import Plan, Segment
from model.engine.rank_host import Hosts, LocalProcess, Process, ThisHost
from model.engine.rank_processes import RankProcesses
from schemas.errors import ConfigError, EngineError
from tests.model.engine.conftest import text_request, tight_memory, token_ids


def _config(checkpoint, ranks: int, **settings) -> EngineConfig:
    settings = {"max_sequences": 32, "chunk_tokens": 192, "threads": 1, **settings}
    return EngineConfig(str(checkpoint), device="cpu", ranks=ranks, **settings)


def gone(pids: list[int], within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_four_ranks_give_the_tokens_of_one(checkpoint, requests, expected):
    with Engine(_config(checkpoint, 4)) as engine:
        pids = engine.rank_pids
        assert token_ids(list(engine.generate(requests))) == expected
    assert gone(pids, within=1.0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_says_how_far_its_start_is(checkpoint, ranks):
    said: list[str] = []
    with Engine(_config(checkpoint, ranks), at=said.append):
        pass
    assert said
    assert all(words.startswith("rank ") and f" of {ranks} " in words for words in said)
    if ranks == 1:
        assert said[-1] == "rank 0 of 1 loading its layers, 100%"


class ByTCP:
    """A host that is reached as one elsewhere would be."""

    gpu = 0

    def start(self):
        with Door("127.0.0.1") as door:
            process: list[LocalProcess] = []

            def let_in() -> None:
                process.append(LocalProcess(knock(door.address, door.key, 5.0)))

            thread = threading.Thread(target=let_in)
            thread.start()
            channel = door.open(5.0)
            thread.join()
            return channel, process[0]


def test_ranks_that_are_reached_and_meet_by_tcp_give_the_same_tokens_and_leave_nothing(
    checkpoint, requests, expected
):
    with Engine(_config(checkpoint, 2), Hosts("127.0.0.1", [ByTCP(), ByTCP()])) as engine:
        pids = engine.rank_pids
        assert token_ids(list(engine.generate(requests))) == expected
        for request in requests:
            engine.add(request)
        engine.step()
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EngineError, match=rf"^rank 1 of 2 \(pid {pids[1]}\) was killed by"):
            list(engine.generate([]))
    assert gone(pids, within=1.0)


class SlowToDie:
    """A process that takes seconds to die, as with 100 GB of a GPU to give back."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid, self.name = process.pid, process.name
        self._died: float | None = None

    def wait(self, seconds: float) -> int | None:
        code = self._process.wait(seconds)
        if code is None:
            return None
        self._died = self._died or time.monotonic()
        left = self._died + 2 - time.monotonic()
        time.sleep(max(0, min(seconds, left)))
        return code if left <= seconds else None

    def kill(self) -> None:
        self._process.kill()


class WithMuchToGiveBack(ThisHost):
    def start(self):
        channel, process = super().start()
        return channel, SlowToDie(process)


def test_a_rank_that_was_killed_and_takes_seconds_to_die_is_said_to_be_killed(checkpoint, requests):
    hosts = Hosts("127.0.0.1", [WithMuchToGiveBack(gpu) for gpu in range(2)])
    with Engine(_config(checkpoint, 2), hosts) as engine:
        for request in requests:
            engine.add(request)
        engine.step()
        pids = engine.rank_pids
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EngineError, match=rf"^rank 1 of 2 \(pid {pids[1]}\) was killed by"):
            list(engine.generate([]))
    assert gone(pids, within=1.0)


def test_every_rank_says_how_long_it_has_computed(checkpoint, requests):
    started = time.monotonic()
    with Engine(_config(checkpoint, 2)) as engine:
        while not all(engine.rank_busy_seconds) and time.monotonic() < started + 60:
            list(engine.generate(requests))
        busy, seconds = engine.rank_busy_seconds, time.monotonic() - started
    assert len(busy) == 2
    assert all(0 < rank < seconds for rank in busy)


def test_ranks_outlive_the_thread_that_made_the_engine_and_a_dead_one_is_named(
    checkpoint, requests, expected, model
):
    made = []
    # Little memory as well, so that ranks save and restore: the second has the softmax layer.
    config = _config(checkpoint, 2, **tight_memory(model, range(4, 8), slots=8, blocks=18))
    thread = threading.Thread(target=lambda: made.append(Engine(config)))
    thread.start()
    thread.join()
    (engine,) = made
    assert engine.capacity == Capacity(8, 18)
    assert token_ids(list(engine.generate(requests))) == expected

    for request in requests:
        engine.add(request)
    engine.step()
    pids = engine.rank_pids
    os.kill(pids[1], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EngineError, match=rf"^rank 1 of 2 \(pid {pids[1]}\) was killed by SIGKILL"):
        list(engine.generate([]))
    assert time.monotonic() - started < 8
    assert gone(pids, within=1.0)
    with pytest.raises(EngineError, match="rank 1 of 2"):
        engine.step()
    engine.close()


def test_the_traceback_of_a_failing_rank_reaches_the_caller(checkpoint):
    with Engine(_config(checkpoint, 2)) as engine:
        image = engine._model.image_token_id
        request = text_request("no-features", 3)
        request.token_ids[1] = image
        plan = Plan(0, (), (), (Segment(0, 0, (0,), 0, 3, False, True),))
        engine._ranks.submit([], Microbatch(plan, request.token_ids, ()))
        with pytest.raises(
            EngineError, match=r"(?s)rank 0 of 2 .*exit code 1.*Traceback.*KeyError"
        ):
            engine._ranks.receive()


def test_a_message_that_a_rank_cannot_read_is_no_hang_and_neither_is_a_closed_engine(checkpoint):
    with Engine(_config(checkpoint, 2)) as engine:
        engine.add(text_request("any", 5))
        assert isinstance(engine._ranks, RankProcesses)
        engine._ranks._ranks[0]._channel.send_bytes(b"no pickle")
        with pytest.raises(EngineError, match=r"(?s)rank 0 of 2 .*UnpicklingError"):
            engine.step()
    with Engine(_config(checkpoint, 2)) as engine:
        engine.add(text_request("any", 5))
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.step()


def test_what_a_rank_finds_wanting_is_a_config_error(checkpoint):
    (checkpoint / "model.safetensors.index.json").rename(checkpoint / "hidden")
    try:
        with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
            Engine(_config(checkpoint, 2))
    finally:
        (checkpoint / "hidden").rename(checkpoint / "model.safetensors.index.json")


def test_no_rank_and_no_file_is_left_when_the_coordinator_is_killed(checkpoint, tmp_path):
    program = f"""
import time
from model.engine.config import EngineConfig
from model.engine.engine import Engine
engine = Engine(EngineConfig({str(checkpoint)!r}, device="cpu", ranks=2, threads=1))
print(*engine.rank_pids, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as coordinator:
        assert coordinator.stdout is not None
        pids = [int(pid) for pid in coordinator.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(_alive, pids))
        coordinator.kill()
        assert gone(pids)
    assert not list(tmp_path.iterdir())
