"""What a run says while it waits for GPUs. Ray itself is not run; test_rank_hosts runs it."""

import time
from types import SimpleNamespace

import pytest

from pipeline import gpus
from pipeline.placement import Placement
from pipeline.rank_hosts import RankHosts

OURS, THEIRS = "MapWorker(MapBatches(Generate))", "MapWorker(MapBatches(Prepare))"


def place(**keys) -> Placement:
    values = {
        "device": "cuda",
        "ranks": 4,
        "replicas": 2,
        "gpus": 4,
        "hosts": None,
        "prepare_workers": 1,
        "prepare_cpus": 1.0,
        "read_cpus": 1.0,
        "threads": None,
        "max_sequences": None,
        "chunk_tokens": 1,
        "batch_rows": 1,
        "calls": 1,
    }
    return Placement(**(values | keys))


@pytest.fixture
def cluster(monkeypatch):
    def pretend(free: list[int], *replicas: tuple[str, int], groups: int = 0) -> None:
        table = [
            {"JobID": job, "ActorClassName": name, "State": state, "Pid": pid}
            for job, name in (("1", OURS), ("1", THEIRS), ("2", OURS))
            for state, pid in (replicas if (job, name) == ("1", OURS) else [("RESTARTING", 0)])
        ]
        nodes = {str(number): {"CPU": 8.0, "GPU": gpus} for number, gpus in enumerate(free)}
        monkeypatch.setattr(gpus, "actors", lambda: dict(enumerate(table)))
        monkeypatch.setattr(gpus, "available_resources_per_node", lambda: nodes)
        monkeypatch.setattr(gpus, "groups_waiting", lambda: groups)
        context = SimpleNamespace(get_job_id=lambda: "1")
        monkeypatch.setattr(gpus.ray, "get_runtime_context", lambda: context)

    return pretend


@pytest.mark.parametrize(
    ("state", "pid", "waits"),
    [
        ("PENDING_CREATION", 0, True),
        ("PENDING_CREATION", 7, False),  # its process runs
        ("ALIVE", 7, False),
        ("RESTARTING", 7, True),  # after a node was lost, the Pid is that of the process there
        ("DEAD", 7, False),
    ],
)
def test_a_replica_waits_when_it_has_no_place_and_there_is_none(cluster, state, pid, waits):
    cluster([0, 0], ("ALIVE", 3), (state, pid))
    said = "waiting for GPUs: 1 of 2 replicas, 4 each; free: 0"
    assert gpus._waiting(place()) == (said if waits else None)


def test_a_replica_that_only_starts_does_not_wait(cluster):
    cluster([4, 0], ("PENDING_CREATION", 0))
    assert gpus._waiting(place()) is None


def test_gpus_that_are_free_on_several_nodes_are_told_apart(cluster):
    cluster([3, 2], ("PENDING_CREATION", 0))
    said = gpus._waiting(place())
    assert said == "waiting for GPUs: 1 of 2 replicas, 4 each; free: 5, but not on one node"


def test_a_replica_that_spans_nodes_waits_for_any_gpus(cluster):
    cluster([2, 1], groups=1)
    spanning = place(gpus=0, hosts=RankHosts(4))
    assert gpus._waiting(spanning) == "waiting for GPUs: 1 of 2 replicas, 4 each; free: 3"
    cluster([2, 2], groups=1)
    assert gpus._waiting(spanning) is None


def test_a_replica_says_how_long_it_waits_for_the_gpus_of_one_node(cluster):
    cluster([2, 2], groups=1)
    patient = place(gpus=0, hosts=RankHosts(4, 120.0))
    assert gpus._waiting(patient) == (
        "waiting for GPUs: 1 of 2 replicas, 4 each; free: 4, but not on one node; taken all the"
        " same after 120 s"
    )
    cluster([2, 1], groups=1)
    assert gpus._waiting(patient) == "waiting for GPUs: 1 of 2 replicas, 4 each; free: 3"
    cluster([4, 0], groups=1)
    assert gpus._waiting(patient) is None


def test_what_was_waited_for_is_taken_back_when_it_is_there(cluster, monkeypatch):
    monkeypatch.setattr(gpus, "LOOK_SECONDS", 0.001)
    said: list[str | None] = []
    cluster([0], ("RESTARTING", 7))
    with gpus.gpus_of(place(), lambda: "", said.append):
        while not (said and said[-1]):
            time.sleep(0.001)
        cluster([0], ("ALIVE", 8))
        while said[-1]:
            time.sleep(0.001)
    assert said[0] is None  # once is not enough


def test_a_terminal_is_not_quiet_while_a_large_model_loads(cluster, monkeypatch):
    monkeypatch.setattr(gpus, "LOOK_SECONDS", 0.001)
    cluster([4])
    words = iter(["rank 0 of 4 loading its layers, 43%", ""])
    said: list[str | None] = []
    with gpus.gpus_of(place(), lambda: next(words, ""), said.append):
        while len(said) < 3:
            time.sleep(0.001)
    assert said[:3] == ["rank 0 of 4 loading its layers, 43%", None, None]
