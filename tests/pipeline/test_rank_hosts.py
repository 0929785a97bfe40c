"""A replica on several nodes: a real Ray cluster on this machine, whose nodes each claim one GPU.

The GPUs are Ray's to count, and nobody's to compute on: the ranks are told to use the CPU.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

import pipeline.run
from model.nano.random_checkpoint import write_random_checkpoint
from pipeline import gpus
from pipeline.placement import Placement, place
from pipeline.tally import Tally
from pipeline.verify import verify
from schemas.errors import ConfigError
from schemas.job import Job
from tests.images import good_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MINUTE = 60.0
IMAGES = 160  # enough that a run lasts until all has been done to it, on a quiet machine too


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
    for name, data in good_images(IMAGES):
        (folder / "in" / f"{name}.jpg").write_bytes(data)
    return folder


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


@pytest.fixture(scope="module")
def alone(cluster, folder) -> tuple[pa.Table, list[str]]:
    """What one rank says, in the replica's own process, and what the run said while another one
    had all the GPUs."""
    others = [hold_a_gpu() for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        said = told(patch, lambda: [ray.kill(other) for other in others])
        pipeline.run.run(job(folder, "alone"))
    return rows_of(folder / "alone"), said


def hold_a_gpu() -> Any:
    class Other:
        def hold(self) -> None:
            """Until it is killed."""

    other: Any = ray.remote(Other)
    holds = other.options(num_cpus=0, num_gpus=1).remote()
    ray.get(holds.hold.remote())
    return holds


def told(monkeypatch, then: Callable[[], object]) -> list[str]:
    """What a run says when it waits, but for how far the model is loaded. `then`: is done when it
    has said something."""
    monkeypatch.setattr(pipeline.run, "place", place_without_gpus)
    monkeypatch.setattr(gpus, "LOOK_SECONDS", 0.5)
    said: list[str] = []

    def hear(_: Tally, what: str | None) -> None:
        if what and not what.startswith("starting: "):
            if not said:
                then()
            said.append(what)

    monkeypatch.setattr(Tally, "waits", hear)
    return said


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
    """Does this and that to a run, one after the other as it goes on. The seconds from a deed until
    all ranks of before are gone, `down`, and until new ones have done a unit, `up`."""

    def __init__(self, output: Path, *deeds: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.down: list[float] = []
        self.up: list[float] = []
        self.nodes: set[str] = set()  # of the replica, at first
        self._output, self._deeds, self._units = output, deeds, commits(output)
        self.start()

    def run(self) -> None:
        self._wait_for_commit(self._units)
        self.nodes = {node for group in groups() for node in group["bundles_to_node_id"].values()}
        for deed in self._deeds:
            before = ranks()
            deed()
            done = time.monotonic()
            wait_for(lambda before=before: not ranks() & before)
            self.down.append(round(time.monotonic() - done, 1))
            units = commits(self._output)
            wait_for(lambda before=before: len(ranks() - before) == 2)
            self._wait_for_commit(units)
            self.up.append(round(time.monotonic() - done, 1))

    def _wait_for_commit(self, before: int) -> None:
        wait_for(lambda: commits(self._output) > before)


def ranks() -> set[int]:
    return {process.pid for process in processes("rank_worker")}


def groups() -> list[dict]:
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def kill(name: str) -> Callable[[], None]:
    return lambda: os.kill(processes(name)[-1].pid, signal.SIGKILL)


def nothing_is_left() -> bool:
    return not (groups() or ranks() or processes("HostActor"))


def test_gpus_that_are_not_there_are_missed_at_once(cluster, folder):
    started = time.monotonic()
    with pytest.raises(ConfigError, match="takes GPUs: 4; the cluster has: 3"):
        pipeline.run.run(job(folder, "never", pp=4))
    assert time.monotonic() - started < 10


def test_a_run_whose_gpus_others_hold_says_so_and_waits(alone):
    rows, said = alone
    assert set(said) == {"waiting for GPUs: 1 of 1 replicas, 1 each; free: 0"}
    assert rows.num_rows == IMAGES


def test_a_replica_of_two_nodes_outlives_kills_and_writes_what_one_rank_does(
    cluster, folder, alone, monkeypatch
):
    monkeypatch.setattr(pipeline.run, "place", place_without_gpus)
    output = folder / "killed"
    disturbance = Disturbance(output, kill("rank_worker"), kill("HostActor"), kill("Generate"))
    news: list[str] = []
    monkeypatch.setattr(Tally, "noted", lambda _, messages: news.extend(messages))
    summary = pipeline.run.run(job(folder, "killed", pp=2))
    disturbance.join(timeout=1)
    print("a killed rank, host, replica: seconds", disturbance.down, "and", disturbance.up)
    assert len(disturbance.nodes) == 2
    assert len(disturbance.up) == summary.restarts == 3
    *two, last = news
    assert all(re.search(r"started again: rank \d of 2 .* was killed by SIGKILL$", n) for n in two)
    assert last.endswith("its process was killed, or its node was lost")
    assert max(disturbance.down) < MINUTE
    assert rows_of(output) == alone[0]
    assert verify(str(output), deep=True).ok
    wait_for(nothing_is_left, 10)


def test_a_killed_driver_leaves_nothing_and_its_successor_outlives_the_loss_of_a_node(
    cluster, folder, alone, monkeypatch
):
    """No spare node is free at first, and the run says so."""
    output = folder / "lost"
    driver = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder), cluster.address], stderr=subprocess.DEVNULL
    )
    wait_for(lambda: commits(output))
    driver.kill()
    driver.wait()
    print("seconds until nothing is left of a killed driver:", wait_for(nothing_is_left, MINUTE))

    other = hold_a_gpu()
    said = told(monkeypatch, lambda: ray.kill(other))
    disturbance = Disturbance(output, lambda: lose_a_node(cluster))
    pipeline.run.run(job(folder, "lost", pp=2))
    disturbance.join(timeout=1)
    print("a lost node: seconds", disturbance.down, "and", disturbance.up)
    assert said[0].startswith("waiting for GPUs: 1 of 1 replicas, 2 each; free: ")
    assert len(disturbance.up) == 1
    assert disturbance.down[0] < MINUTE
    assert rows_of(output) == alone[0]
    assert verify(str(output), deep=True).ok
    wait_for(nothing_is_left, 10)


def lose_a_node(cluster: Cluster) -> None:
    """One that has a rank; not the head, with which the whole cluster would go."""
    used = {node for group in groups() for node in group["bundles_to_node_id"].values()}
    cluster.remove_node(next(node for node in cluster.worker_nodes if node.node_id in used))


if __name__ == "__main__":  # the driver that is killed
    pipeline.run.place = place_without_gpus
    pipeline.run.run(job(Path(sys.argv[1]), "lost", pp=2, address=sys.argv[2]))
