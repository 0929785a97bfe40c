"""The GPUs of a run while it works: says when replicas wait for some or load the model, and gives
back what they took."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import ray
from ray._private.state import actors, available_resources_per_node
from ray.exceptions import RayError

from pipeline.placement import Placement
from pipeline.rank_hosts import give_back_gpus, groups_waiting

LOOK_SECONDS = 5.0
_NOWHERE = {("PENDING_CREATION", False), ("RESTARTING", False), ("RESTARTING", True)}


@contextmanager
def gpus_of(
    place: Placement, starting: Callable[[], str], show: Callable[[str | None], None]
) -> Iterator[None]:
    """While inside, `show` gets a line when replicas wait for GPUs, or how far one is that is
    `starting`; None when they do no longer.

    Nobody gives up: on a cluster that is shared, the GPUs are free when another run has ended, or
    when a node is replaced.
    """
    done = threading.Event()

    def look() -> None:
        before = None
        while not done.wait(LOOK_SECONDS):
            with suppress(RayError):  # the cluster is busy: look again
                now = _waiting(place) if place.gpus or place.hosts else None
                # Twice in a row: every replica waits for a moment when it starts.
                show(now if now and before else starting() or None)
                before = now

    looking = threading.Thread(target=look, name="gpus", daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join(LOOK_SECONDS)  # or it would find Ray shut down
        if place.hosts:
            give_back_gpus()


def _waiting(place: Placement) -> str | None:
    """How many replicas have asked for GPUs and not got them, when too few are free."""
    waiting = groups_waiting() if place.hosts else _actors_waiting()
    free = [int(node.get("GPU", 0)) for node in available_resources_per_node().values()]
    anywhere = place.hosts and not place.hosts.patience
    if not waiting or (sum(free) if anywhere else max(free, default=0)) >= place.ranks:
        return None
    scattered = ", but not on one node" if sum(free) >= place.ranks else ""
    if scattered and place.hosts:
        scattered += f"; taken all the same after {place.hosts.patience:.0f} s"
    return (
        f"waiting for GPUs: {waiting} of {place.replicas} replicas, {place.ranks} each;"
        f" free: {sum(free)}{scattered}"
    )


def _actors_waiting() -> int:
    """Actors of this run (Ray job) that are replicas and run nowhere yet."""
    job = ray.get_runtime_context().get_job_id()
    return sum(
        actor["JobID"] == job
        and actor["ActorClassName"].endswith("(Generate))")  # as Ray Data calls them
        # A process that was given a place has a Pid; in a restart it is still that of the old one.
        and (actor["State"], bool(actor["Pid"])) in _NOWHERE
        for actor in actors().values()
    )
