"""A replica on several nodes: a real Ray cluster on this machine, whose nodes each claim one GPU.

The GPUs are Ray's to count, and nobody's to compute on: the ranks are told to use the CPU.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

import pipeline.run
from model.nano.random_checkpoint import write_random_checkpoint
from pipeline.placement import Placement, place
from pipeline.verify import verify
from schemas.job import Job
from tests.images import good_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MINUTE = 60.0


@pytest.fixture(scope="module")
def cluster():
    head = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=0, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_random_checkpoint(folder / "checkpoint", tile=56)
    (folder / "in").mkdir()
    for name, data in good_images(40):
        (folder / "in" / f"{name}.jpg").write_bytes(data)
    return folder


@pytest.fixture(autouse=True)
def cpu_for_gpu(monkeypatch):
    monkeypatch.setattr(pipeline.run, "place", place_without_gpus)


def place_without_gpus(job: Job, renders: bool) -> Placement:
    return replace(place(job, renders), device="cpu", threads=1, chunk_tokens=512)


def job(folder: Path, output: str, **keys) -> Job:
    small = {"unit_rows": 4, "max_new_tokens": 24, "max_sequences": 2, "address": "auto"}
    return Job(
        source=str(folder / "in"),
        output=str(folder / output),
        model=str(folder / "checkpoint"),
        prompt="Say it.",
        **(small | keys),
    )


@pytest.fixture
def expected(cluster, folder) -> pa.Table:
    """What one rank, in the replica's own process, says."""
    if not (folder / "expected").exists():
        pipeline.run.run(job(folder, "expected"))
    return rows_of(folder / "expected")


def rows_of(output: Path) -> pa.Table:
    columns = ["row_id", "status", "text", "output_tokens", "mean_logprob", "image_sha256"]
    return ds.dataset(output, format="parquet").to_table(columns=columns).sort_by("row_id")


def commits(output: Path) -> int:
    return len(list((output / "_vl01" / "commits").glob("*.json")))


def processes(name: str) -> list[psutil.Process]:
    """Of the cluster, by what their command line holds."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 2 * MINUTE) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.1)
    return time.monotonic() - started


class Disturbance(threading.Thread):
    """Does this and that to a run, one after the other as it goes on. Each of `seconds` is the time
    from a deed until a unit is committed that new ranks have computed."""

    def __init__(self, output: Path, *deeds: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self.nodes: set[str] = set()  # of the replica, at first
        self._output, self._deeds = output, deeds
        self.start()

    def run(self) -> None:
        self._wait_for_commit()
        self.nodes = {node for group in groups() for node in group["bundles_to_node_id"].values()}
        for deed in self._deeds:
            before = {process.pid for process in processes("rank_worker")}
            deed()
            done = time.monotonic()
            wait_for(partial(are_new, before))
            self._wait_for_commit()
            self.seconds.append(round(time.monotonic() - done, 1))

    def _wait_for_commit(self) -> None:
        before = commits(self._output)
        wait_for(lambda: commits(self._output) > before)


def are_new(before: set[int]) -> bool:
    """Two ranks run, and none of those."""
    now = {process.pid for process in processes("rank_worker")}
    return len(now) == 2 and not now & before


def groups() -> list[dict]:
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def kill(name: str) -> Callable[[], None]:
    return lambda: os.kill(processes(name)[-1].pid, signal.SIGKILL)


def nothing_is_left() -> bool:
    return not (groups() or processes("rank_worker") or processes("HostActor"))


def test_a_replica_of_two_nodes_outlives_kills_and_writes_what_one_rank_does(
    cluster, folder, expected
):
    output = folder / "out"
    disturbance = Disturbance(output, kill("rank_worker"), kill("HostActor"), kill("Generate"))
    pipeline.run.run(job(folder, "out", pp=2))
    disturbance.join(timeout=1)
    print("seconds to recover from a killed rank, host, replica:", disturbance.seconds)
    assert len(disturbance.nodes) == 2
    assert len(disturbance.seconds) == 3
    assert max(disturbance.seconds) < MINUTE
    assert rows_of(output) == expected
    assert verify(str(output), deep=True).ok
    wait_for(nothing_is_left, 10)
