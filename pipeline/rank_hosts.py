"""The ranks of a replica whose GPUs are on several nodes: a placement group, an actor for each GPU.

The replica's own actor takes no GPU then, and asks here for a host for each of its ranks.
"""

import logging
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util import (
    get_node_ip_address,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from model.engine.channel import Door, knock
from model.engine.rank_host import Hosts, LocalProcess
from schemas.errors import EngineError

logger = logging.getLogger(__name__)

_CREATED = "CREATED"  # Ray's word for a placement group that has all that it asked for
_START_SECONDS = 60.0  # for an actor whose GPU is there
_ANSWER_SECONDS = 2.0  # for an actor that has only to say what it knows


@dataclass(frozen=True)
class RankHosts:
    """Takes GPUs for the ranks of one replica; made anywhere, called in the replica's actor.

    patience: seconds to wait for those of a single node, before they are taken wherever they are.
    """

    ranks: int
    patience: float = 0.0

    def __call__(self) -> Hosts:
        """On as few nodes as have the GPUs free, those of one node in a row. Waits for them.

        What an earlier life of this actor took is taken over, or given back if a node of it is
        gone: Ray would put it together again on other nodes, but actors waiting for it hang.
        Raises EngineError when a host does not start.
        """
        here, address = ray.get_runtime_context().get_node_id(), get_node_ip_address()
        group = _group(self.ranks, self.patience)
        nodes = placement_group_table(group)["bundles_to_node_id"]
        # Rank 0, which takes the images, is on this node if any is.
        bundles = sorted(nodes, key=lambda bundle: (nodes[bundle] != here, nodes[bundle], bundle))
        actors = [_actor(group, bundle) for bundle in bundles]
        _wait_until_up(actors, group)
        return Hosts(address, [HostElsewhere(actor, address) for actor in actors])


def groups_waiting() -> int:
    """Replicas of this run (Ray job) that have asked for GPUs and not got them."""
    return sum(group["state"] != _CREATED for group in _groups_of_job())


def give_back_gpus() -> None:
    """That the replicas of this run (Ray job) took. Ray does so when the job ends, not before."""
    with suppress(RayError, ValueError):  # without a cluster, or without the group, they are
        for group in _groups_of_job():
            remove_placement_group(get_placement_group(group["name"]))


class HostActor:
    """Holds one GPU, which is the only one that Ray shows it. Its rank dies with it."""

    def ready(self) -> None:
        """Returns."""

    def start(self, door: tuple[str, int], key: bytes) -> tuple[int, str]:
        """Starts a rank whose coordinator waits at the door. Its pid, and the address of this node.
        Raises OSError."""
        address = get_node_ip_address()
        self._rank = LocalProcess(knock(door, key, _START_SECONDS), _interface_of(address))
        return self._rank.pid, address

    def wait(self, seconds: float) -> int | None:
        """For the rank to end. Its exit code, None while it runs."""
        return self._rank.wait(seconds)


@dataclass(frozen=True)
class HostElsewhere:
    """The RankHost of an engine that starts its rank by way of a HostActor.

    address: of this node, by which the rank's reaches it.
    """

    actor: ActorHandle
    address: str
    gpu: int = 0

    def start(self) -> tuple[Connection, "ProcessElsewhere"]:
        with Door(self.address) as door:
            started = self.actor.start.remote(door.address, door.key)
            try:
                channel = _open(door, started)
                return channel, ProcessElsewhere(self.actor, *ray.get(started))
            except (RayError, OSError) as error:
                raise EngineError(f"a rank on another node did not start: {error}") from error


class ProcessElsewhere:
    """A rank's process, of which a HostActor knows."""

    def __init__(self, actor: ActorHandle, pid: int, address: str) -> None:
        self.pid = pid
        self.name = f"pid {pid} on {address}"
        self._actor = actor
        self._exit_code: int | None = None

    def wait(self, seconds: float) -> int | None:
        if self._exit_code is None:
            try:
                ended: Any = self._actor.wait.remote(max(0.0, seconds))
                self._exit_code = ray.get(ended, timeout=max(0.0, seconds) + _ANSWER_SECONDS)
            except GetTimeoutError:
                logger.warning("the host of the rank with %s does not answer", self.name)
            except RayError as error:
                logger.warning("the host of the rank with %s is gone: %s", self.name, error)
                self._exit_code = -signal.SIGKILL
        return self._exit_code

    def kill(self) -> None:
        ray.kill(self._actor)


def _open(door: Door, started: ray.ObjectRef) -> Connection:
    """The channel to the rank that is being started. Raises what keeps it from being so."""
    while True:
        try:
            return door.open(1.0)
        except TimeoutError:
            failed, _ = ray.wait([started], timeout=0)
            if failed:
                ray.get(failed)
                raise


def _wait_until_up(actors: list[ActorHandle], group: PlacementGroup) -> None:
    """Raises EngineError, at once when Ray finds that a node is gone: nothing on it will start."""
    left: list[Any] = [actor.ready.remote() for actor in actors]
    deadline = time.monotonic() + _START_SECONDS
    while left and time.monotonic() < deadline and _is_there(group):
        up, left = ray.wait(left, timeout=1.0)
        try:
            ray.get(up)
        except RayError as error:
            raise EngineError(f"the host of a rank did not start: {error}") from error
    if left:
        why = "is not up after a minute" if _is_there(group) else "was on a node that is gone"
        raise EngineError(f"the host of a rank {why}")


def _actor(group: PlacementGroup, bundle: int) -> ActorHandle:
    where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    actor: Any = ray.remote(HostActor)
    return actor.options(num_cpus=0, num_gpus=1, scheduling_strategy=where).remote()


def _group(ranks: int, patience: float) -> PlacementGroup:
    """The one of this actor, with a GPU in each bundle. Waits until they are there."""
    name = f"{_prefix()}{ray.get_runtime_context().get_actor_id()}"
    try:
        group = get_placement_group(name)
        if _is_there(group):
            return group
        remove_placement_group(group)
    except ValueError:  # there is none
        pass
    bundles = [{"GPU": 1.0}] * ranks
    if patience:
        group = placement_group(bundles, strategy="STRICT_PACK", name=name)
        if group.wait(patience):
            return group
        remove_placement_group(group)
    # Ray fills the node with the most free GPUs first.
    group = placement_group(bundles, strategy="PACK", name=name)
    while not group.wait(60):
        logger.warning("still waiting for %d GPUs", ranks)
    return group


def _is_there(group: PlacementGroup) -> bool:
    """Has it all its GPUs, and is no node of them known to be gone?"""
    return placement_group_table(group)["state"] == _CREATED


def _groups_of_job() -> list[dict[str, Any]]:
    return [
        group
        for group in placement_group_table().values()
        if group["name"].startswith(_prefix()) and group["state"] != "REMOVED"
    ]


def _prefix() -> str:
    """Of the names of this Ray job's placement groups; the id of an actor follows."""
    return f"vl01-replica-{ray.get_runtime_context().get_job_id()}-"


def _interface_of(address: str) -> str | None:
    """The name of this machine's network interface with this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None
