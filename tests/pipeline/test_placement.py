"""What the cluster is asked for, and what is said when it is not there. Ray itself is not run."""

import heapq
import logging
import random
import socket
import time
from collections import Counter, deque

import pytest
import ray
from ray.exceptions import RayError

from pipeline import placement
from pipeline.placement import place, plain_error, ray_session
from pipeline.rank_hosts import RankHosts
from schemas.errors import ConfigError, EngineError, ExitCode, StoppedError
from schemas.job import Job

CPU = {"device": "cpu"}


def job(**keys) -> Job:
    return Job(source="in", output="out", model="model", prompt="What is it?", **keys)


@pytest.fixture
def cluster(monkeypatch):
    """Pretends that Ray has joined a cluster of nodes with these resources."""

    def pretend(*nodes: dict[str, float], free: list[int] | None = None) -> None:
        """free: GPUs of each node; all, if nobody holds any."""
        left = [node.get("GPU", 0) for node in nodes] if free is None else free
        resources = {str(number): {"GPU": gpus} for number, gpus in enumerate(left)}
        monkeypatch.setattr(placement, "available_resources_per_node", lambda: resources)
        monkeypatch.setattr(
            ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes]
        )

    return pretend


def test_too_few_gpus_are_named_before_any_model_is_loaded(cluster):
    cluster({"CPU": 16, "GPU": 4})
    with pytest.raises(ConfigError, match="takes GPUs: 8; the cluster has: 4"):
        place(job(pp=4, replicas=2))


def test_a_replica_spans_nodes_only_where_too_few_of_them_have_gpus_for_all_its_ranks(cluster):
    cluster({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2})
    placed = place(job(pp=4))
    assert (placed.gpus, placed.hosts) == (0, RankHosts(4))
    cluster({"CPU": 8, "GPU": 6}, {"CPU": 8, "GPU": 6})
    placed = place(job(pp=4, replicas=2))
    assert (placed.gpus, placed.hosts) == (4, None)
    placed = place(job(pp=4, replicas=3))
    assert (placed.gpus, placed.hosts) == (0, RankHosts(4))


@pytest.mark.parametrize(
    ("nodes", "free", "pp", "spans"),
    [
        ([4, 4], [2, 2], 4, True),
        ([4, 4], [0, 0], 4, True),  # which come first, nobody knows
        ([4, 4], [0, 4], 4, False),
        ([4, 4], [3, 3], 2, False),
        ([4, 4], [0, 0], 1, False),
        ([8], [2], 4, False),  # there is nowhere else
    ],
)
def test_gpus_that_others_leave_on_several_nodes_are_taken_after_a_while(
    cluster, nodes, free, pp, spans
):
    cluster(*({"CPU": 8, "GPU": gpus} for gpus in nodes), free=free)
    placed = place(job(pp=pp))
    expected = (0, RankHosts(pp, placement.FOR_ONE_NODE_SECONDS)) if spans else (pp, None)
    assert (placed.gpus, placed.hosts) == expected


@pytest.mark.parametrize(
    ("nodes", "pp", "replicas"), [([8], 4, 2), ([6, 6], 4, 3), ([4, 4, 3], 4, 2), ([1, 1], 2, 1)]
)
def test_auto_fills_the_cluster(cluster, nodes, pp, replicas):
    cluster({"CPU": 4}, *({"CPU": 8, "GPU": gpus} for gpus in nodes))
    assert place(job(pp=pp, replicas="auto")).replicas == replicas


def test_auto_with_no_gpus_for_one_replica_is_refused_too(cluster):
    cluster({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1})
    with pytest.raises(ConfigError, match="takes GPUs: 4; the cluster has: 2"):
        place(job(pp=4, replicas="auto"))


def test_auto_on_cpu_is_a_replica_on_each_node_with_all_its_cores(cluster):
    cluster({"CPU": 0}, {"CPU": 16}, {"CPU": 8})
    placed = place(job(pp=2, replicas="auto"))
    assert (placed.replicas, placed.threads, placed.gpus, placed.hosts) == (2, 4, 0, None)


def test_a_gpu_asked_for_by_name_is_not_quietly_replaced_by_the_cpu(cluster):
    cluster({"CPU": 8})
    with pytest.raises(ConfigError, match="the cluster has: 0"):
        place(job(device="cuda"))


def test_each_rank_takes_a_gpu_and_the_other_cores_prepare(cluster):
    cluster({"CPU": 16, "GPU": 8})
    placed = place(job(pp=4, replicas=2))
    assert (placed.device, placed.gpus, placed.prepare_workers) == ("cuda", 4, 15)


def test_rendering_gets_half_of_the_cores_and_always_two_documents_at_a_time(cluster):
    cluster({"CPU": 16, "GPU": 8})
    placed = place(job(pp=4), renders=True)
    assert (placed.prepare_workers, placed.prepare_cpus, placed.read_cpus) == (8, 1.0, 1.0)
    cluster({"CPU": 2})
    assert place(job(), renders=True).read_cpus == 0.5
    assert place(job()).read_cpus == 0.25


def test_ranks_on_cpu_share_the_cores_and_never_more_than_there_are(cluster):
    cluster({"CPU": 2})
    placed = place(job(pp=2, replicas=2))
    assert (placed.device, placed.gpus, placed.threads) == ("cpu", 0, 1)
    assert placed.prepare_workers == 1


@pytest.mark.parametrize(("cores", "workers"), [(1, None), (1, 4), (2, 2), (3, 3), (4, 9), (16, 5)])
def test_reading_is_not_starved_by_the_prepare_workers(cluster, cores, workers):
    """Cutting the plan into units takes a whole core; without one a run would wait for ever."""
    cluster({"CPU": cores})
    placed = place(job(prepare_workers=workers))
    assert placed.prepare_workers * placed.prepare_cpus <= cores - 1
    assert placed.prepare_cpus <= 1


def test_a_replica_holds_several_times_the_rows_it_computes_at_once(cluster):
    cluster({"CPU": 2})
    for sequences in (1, 3, 16, 100):
        placed = place(job(max_sequences=sequences))
        assert placed.batch_rows * placed.calls >= placement.HELD_PER_SEQUENCE * sequences


@pytest.mark.parametrize(
    ("sequences", "keys"), [(128, {}), (350, {}), (350, {"max_sequences": 350}), (16, CPU)]
)
def test_a_few_long_answers_do_not_leave_a_replica_half_empty(cluster, sequences, keys):
    """A batch comes back when its longest answer is done, and the next is given then."""
    cluster({"CPU": 8, "GPU": 1})
    placed = place(job(**keys))
    dice = random.Random(0)
    answers = [dice.lognormvariate(6, 0.8) for _ in range(100 * sequences)]  # tokens, as of pages
    assert share_at_work(answers, sequences, placed.batch_rows, placed.calls) > 0.95


def share_at_work(answers: list[float], sequences: int, batch_rows: int, calls: int) -> float:
    """Of the sequences that fit, while there are batches to give. Answers are written side by side,
    a token at a time."""
    batches = deque(range(0, len(answers), batch_rows))
    held: deque[int] = deque()
    left: Counter[int] = Counter()
    working: list[tuple[float, int]] = []
    now = busy = 0.0

    def give() -> None:
        first = batches.popleft()
        rows = range(first, min(first + batch_rows, len(answers)))
        held.extend(rows)
        left[first] = len(rows)

    for _ in range(calls):
        give()
    while batches:
        while held and len(working) < sequences:
            row = held.popleft()
            heapq.heappush(working, (now + answers[row], row))
        ends, row = heapq.heappop(working)
        busy, now = busy + (len(working) + 1) * (ends - now), ends
        left[first := row - row % batch_rows] -= 1
        if not left[first]:
            give()
    return busy / now / sequences


NESTED = """ray::MapBatches(Generate)() (pid=1, ip=127.0.0.1)
  File "x.py", line 6, in f
    raise ConfigError("too small")
schemas.errors.ConfigError: too small: 2 MiB

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block.
To change retry attempts, configure something: please."""


def test_a_workers_configuration_error_keeps_its_words_and_its_exit_code():
    error = plain_error(RayError(NESTED))
    assert isinstance(error, ConfigError)
    assert str(error) == "too small: 2 MiB"
    assert error.exit_code == ExitCode.USAGE


DIED = "The actor died unexpectedly.\n\tclass_name: MapWorker\n\tpid: 7\nIt exited with 139."


@pytest.mark.parametrize(
    "text", [NESTED.replace("schemas.errors.Config", "Value"), "no traceback", DIED]
)
def test_any_other_error_of_a_worker_stops_the_run_in_one_line(text):
    error = plain_error(RayError(text))
    assert isinstance(error, EngineError)
    assert error.exit_code == ExitCode.STOPPED
    assert len(str(error).splitlines()) == 1


def test_an_address_that_is_none_is_a_clear_line():
    with pytest.raises(ConfigError, match="no Ray cluster answers at 'foo'"), ray_session("foo"):
        pass


def test_a_machine_too_busy_for_ray_to_start_on_is_told_in_words(monkeypatch):
    def slowly(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(placement.ray, "init", slowly)
    words = "Ray did not start: The current node timed out during startup. On a busy machine, try"
    with pytest.raises(StoppedError, match=words), ray_session("local"):
        pass


def test_ray_data_is_silent_on_the_terminal_and_what_others_listen_with_is_left_alone():
    theirs = logging.getLogger("ray.data")
    ours = logging.StreamHandler()
    theirs.addHandler(ours)
    try:
        placement._quieten_ray_data()
        levels = {type(handler).__name__: handler.level for handler in theirs.handlers}
    finally:
        theirs.removeHandler(ours)
    assert levels["PlainRayHandler"] == logging.CRITICAL
    assert levels["StreamHandler"] == logging.NOTSET


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_at_which_nobody_listens_is_refused_at_once(scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
    started = time.monotonic()
    says = f"no Ray cluster answers at '{address}'.*refused"
    with pytest.raises(ConfigError, match=says), ray_session(address):
        pass
    assert time.monotonic() - started < 10
