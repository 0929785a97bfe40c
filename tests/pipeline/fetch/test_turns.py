"""A host is asked by so many at a time and so often, whoever asks, and never locked for good."""

import multiprocessing
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from pipeline.fetch.turns import Turns


class Gauge:
    """How many were inside at once, and when each came in."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.begun: list[float] = []
        self._lock = threading.Lock()

    def visit(self, turns: Turns, host: str, seconds: float) -> None:
        with turns.take(host):
            with self._lock:
                self.begun.append(time.monotonic())
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(seconds)
            with self._lock:
                self.now -= 1


def visit_all(hosts: list[str], seconds: float, **options) -> Gauge:
    gauge = Gauge()
    with ThreadPoolExecutor(len(hosts)) as pool:
        list(pool.map(lambda host: gauge.visit(Turns(**options), host, seconds), hosts))
    return gauge


def test_no_more_requests_to_one_host_than_allowed_and_others_do_not_wait(tmp_path):
    gauge = visit_all(["a"] * 12, 0.05, requests=3, rate=1e6, folder=str(tmp_path))
    assert gauge.most == 3
    hosts = [f"host{i}" for i in range(8)]
    gauge = visit_all(hosts, 0.3, requests=1, rate=1e6, folder=str(tmp_path))
    assert gauge.most >= 6  # two may fall into one bucket


def test_requests_to_one_host_begin_no_faster_than_the_rate(tmp_path):
    gauge = visit_all(["a"] * 8, 0.0, requests=8, rate=20.0, folder=str(tmp_path))
    gaps = [b - a for a, b in zip(sorted(gauge.begun), sorted(gauge.begun)[1:], strict=False)]
    assert sum(gaps) >= 0.3
    assert max(gauge.begun) - min(gauge.begun) < 2


def test_a_host_that_asks_for_a_pause_gets_one_from_all(tmp_path):
    Turns(4, 1e6, str(tmp_path)).pause("a", 0.5)
    began = time.monotonic()
    with Turns(4, 1e6, str(tmp_path)).take("a"):
        assert time.monotonic() - began > 0.45
    with Turns(4, 1e6, str(tmp_path)).take("b"):
        assert time.monotonic() - began < 0.9


def test_a_moment_written_before_the_machine_started_anew_is_not_waited_for(tmp_path):
    turns = Turns(4, 10.0, str(tmp_path))
    with turns.take("a"):
        (stored,) = tmp_path.glob("*.next")
    stored.write_bytes(struct.pack("d", time.monotonic() + 1e6))
    began = time.monotonic()
    with turns.take("a"):
        assert time.monotonic() - began < 1


def hold(folder: str, begun) -> None:
    with Turns(1, 1e6, folder).take("a"):
        begun.set()
        time.sleep(60)


def test_a_process_that_dies_in_its_turn_leaves_it_to_the_others(tmp_path):
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), begun))
    process.start()
    assert begun.wait(60)
    free = threading.Event()

    def wait_for_turn() -> None:
        with Turns(1, 1e6, str(tmp_path)).take("a"):
            free.set()

    thread = threading.Thread(target=wait_for_turn)
    thread.start()
    assert not free.wait(0.3)
    process.kill()
    assert free.wait(10)
    thread.join()
    process.join()
