"""Where the stages run: the Ray session, and what each stage takes of the cluster."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import ray.data

from schemas.errors import ConfigError
from schemas.job import Job

# Rows a replica holds beyond those in flight, as a multiple of them: fewer and the engine drains
# between batches (slots 55% busy at 1x, 97% at 3x and more).
HELD_PER_SEQUENCE = 3


@dataclass(frozen=True)
class Placement:
    """What each stage takes. A replica is one actor; its ranks are processes under it."""

    device: str  # cpu or cuda
    ranks: int
    replicas: int
    prepare_workers: int
    batch_rows: int  # rows of one call of a replica
    calls: int  # calls of a replica side by side

    @property
    def gpus_per_replica(self) -> int:
        return self.ranks if self.device == "cuda" else 0


@contextmanager
def ray_session(address: str) -> Iterator[None]:
    """Joins the cluster at `address`, or starts Ray on this machine, and leaves it at the end.

    Ray's own progress bars and log lines stay in its session folder; errors that end a run reach
    the user as exceptions.
    """
    # One harmless C++ warning per actor pool would otherwise reach the terminal (Ray issue 53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers at {address!r}: {error}. Expected local (start Ray on this"
                " machine), auto, or the address of a running cluster."
            ) from error
    _quieten_ray_data()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def place(job: Job) -> Placement:
    """Decides on the stages' shares of the cluster that this process has joined.

    Raises ConfigError when the GPUs asked for are not there.
    """
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    device = job.device if job.device != "auto" else ("cuda" if gpus else "cpu")
    if device == "cuda":
        _check_gpus(job, gpus)
    sequences = job.max_sequences or (128 if device == "cuda" else 16)
    batch_rows = max(1, sequences // 4)
    cores = int(resources.get("CPU", 1))
    return Placement(
        device=device,
        ranks=job.pp,
        replicas=job.replicas,
        prepare_workers=job.prepare_workers or _prepare_workers(device, cores, job),
        batch_rows=batch_rows,
        calls=max(4, (1 + HELD_PER_SEQUENCE) * sequences // batch_rows),
    )


def _prepare_workers(device: str, cores: int, job: Job) -> int:
    """All cores but one, which reads; on CPU the model needs them more: one per replica."""
    return max(1, cores - 1) if device == "cuda" else min(job.replicas, max(1, cores - 1))


def _check_gpus(job: Job, gpus: int) -> None:
    needed = job.pp * job.replicas
    if gpus < needed:
        raise ConfigError(
            f"{job.replicas} replicas of {job.pp} ranks need {needed} GPUs; the cluster has {gpus}."
            " Lower --replicas or --pp, or add GPUs."
        )
    largest = max(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
    if largest < job.pp:
        raise ConfigError(
            f"--pp {job.pp} needs a node with {job.pp} GPUs; the largest here has {largest}."
            " The ranks of a replica share one node."
        )


def _quieten_ray_data() -> None:
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        ):
            handler.setLevel(logging.CRITICAL)
    # `max_task_retries` reaches map_batches as an extra argument, which Ray 2.64 will refuse.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*deprecated")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def configure_ray_data(block_bytes: int) -> None:
    """Ray Data's settings that a long run over a large model needs, in this process."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = block_bytes
    context.execution_no_progress_timeout_s = -1  # loading 423 GiB takes longer than the default
    context.actor_init_retry_on_errors = True
    context.max_consecutive_actor_init_deaths = 3
    context.max_errored_blocks = 0  # more would drop whole blocks of rows
