"""A replica for which no node of a real Ray cluster has enough GPUs free: it takes what is there,
once it has waited for one node."""

from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import pipeline.run
from model.nano.random_checkpoint import write_random_checkpoint
from pipeline import placement
from pipeline.tally import Tally
from pipeline.verify import verify
from tests.images import good_images
from tests.pipeline.test_rank_hosts import groups, job, nothing_is_left, rows_of, told, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE = 8.0


@pytest.fixture
def cluster():
    head = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=0, num_gpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def hold_a_gpu_of_each_node() -> list[Any]:
    class Other:
        def hold(self) -> None:
            """Until it is killed."""

    other: Any = ray.remote(Other)
    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
    others = [
        other.options(num_cpus=0, num_gpus=1, scheduling_strategy=node).remote() for node in nodes
    ]
    ray.get([each.hold.remote() for each in others])
    return others


def test_gpus_that_others_leave_on_two_nodes_are_not_waited_past_for_ever(
    cluster, tmp_path, monkeypatch
):
    write_random_checkpoint(tmp_path / "checkpoint", tile=56)
    (tmp_path / "in").mkdir()
    for name, data in good_images(8):
        (tmp_path / "in" / f"{name}.jpg").write_bytes(data)
    monkeypatch.setattr(placement, "FOR_ONE_NODE_SECONDS", PATIENCE)
    others = hold_a_gpu_of_each_node()

    said, nodes = told(monkeypatch, lambda: None), set()
    generated = Tally.generated

    def look(self, rows) -> None:
        nodes.update(node for each in groups() for node in each["bundles_to_node_id"].values())
        generated(self, rows)

    monkeypatch.setattr(Tally, "generated", look)
    pipeline.run.run(job(tmp_path, "scattered", pp=2))
    assert set(said) == {
        "waiting for GPUs: 1 of 1 replicas, 2 each; free: 2, but not on one node; taken all the"
        " same after 8 s"
    }
    assert len(nodes) == 2
    assert rows_of(tmp_path / "scattered").num_rows == 8
    assert verify(str(tmp_path / "scattered"), deep=True).ok
    wait_for(nothing_is_left, 10)

    for other in others:
        ray.kill(other)
    wait_for(lambda: ray.available_resources().get("GPU") == 4, 10)
    assert placement.place(job(tmp_path, "free", pp=2)).hosts is None
