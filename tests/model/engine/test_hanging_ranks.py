"""A rank that hangs is found, named and ended within seconds; one that is slow is waited for."""

import os
import signal
import time

import numpy as np
import pytest

from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.engine.microbatch import Image, Microbatch
from model.engine.plan import Plan
from schemas.errors import EngineError
from tests.model.engine.conftest import token_ids
from tests.model.engine.test_rank_processes import gone
from tests.model.engine.troubled_worker import SLOW_SECONDS

pytestmark = pytest.mark.slow

HANG_SECONDS = 6
NOTICED = HANG_SECONDS + 6  # on a busy machine


def _config(checkpoint) -> EngineConfig:
    return EngineConfig(
        str(checkpoint),
        device="cpu",
        ranks=2,
        max_sequences=4,
        threads=1,
        hang_seconds=HANG_SECONDS,
    )


def test_a_slow_microbatch_is_waited_for_and_a_stopped_process_is_not(
    checkpoint, requests, expected, trouble
):
    assert SLOW_SECONDS > 2 * HANG_SECONDS
    trouble(("slow", 0, 1, "forward", 0, 3))
    with Engine(_config(checkpoint)) as engine:
        started = time.monotonic()
        assert token_ids(list(engine.generate(requests[:4]))) == {
            request.id: expected[request.id] for request in requests[:4]
        }
        assert time.monotonic() - started > SLOW_SECONDS

        for request in requests:
            engine.add(request)
        engine.step()
        pids = engine.rank_pids
        os.kill(pids[0], signal.SIGSTOP)
        stopped = time.monotonic()
        with pytest.raises(
            EngineError, match=rf"^rank 0 of 2 \(pid {pids[0]}\) hangs: no answer for \d+ s, was "
        ):
            list(engine.generate([]))
        assert HANG_SECONDS <= time.monotonic() - stopped < NOTICED
        assert gone(pids, within=1.0)


def test_a_stopped_rank_that_takes_no_more_images_is_ended_and_named(checkpoint):
    with Engine(_config(checkpoint)) as engine:
        pids = engine.rank_pids
        os.kill(pids[0], signal.SIGSTOP)
        flood = [Image(n, np.zeros((99, 56, 56, 3), np.uint8), (56, 56)) for n in range(4)]
        stopped = time.monotonic()
        engine._ranks.submit(flood, Microbatch(Plan(0, (), (), ()), np.empty(0), ()))
        assert HANG_SECONDS / 2 <= time.monotonic() - stopped < NOTICED
        with pytest.raises(
            EngineError, match=rf"^rank 0 of 2 \(pid {pids[0]}\) took no message, and was killed by"
        ):
            engine._ranks.receive()
        assert gone(pids, within=1.0)


@pytest.mark.parametrize(
    ("trouble_met", "said"),
    [
        (
            ("stuck", 0, 1, "forward", 0, 3),
            r"rank 1 of 2 \(pid \d+\) hangs: no progress for \d+ s, is computing microbatch 2",
        ),
        (
            ("lost", 0, 0, "send", 0, None),
            r"rank 1 of 2 .*is waiting for microbatch 0 of the rank be",
        ),
    ],
    ids=["a kernel that never ends", "hidden states that never arrive"],
)
def test_what_never_ends_is_noticed_though_the_process_answers(
    checkpoint, requests, trouble, trouble_met, said
):
    trouble(trouble_met)
    with Engine(_config(checkpoint)) as engine:
        pids = engine.rank_pids
        for request in requests:
            engine.add(request)
        started = time.monotonic()
        with pytest.raises(EngineError, match=said):
            list(engine.generate([]))
        assert time.monotonic() - started < 2 * NOTICED
        assert gone(pids, within=1.0)
