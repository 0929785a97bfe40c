"""Where the stages run: the Ray session, and what each stage takes of the cluster."""

import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import ray
import ray.data
from ray._private import worker as ray_worker
from ray._private.log import PlainRayHandler
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError

from model.engine.config import MOST_SEQUENCES, usual_chunk_tokens
from model.engine.rank_host import GIVE_MEMORY_BACK
from pipeline.rank_hosts import RankHosts
from schemas.errors import CheckpointError, ConfigError, EngineError, StoppedError, VL01Error
from schemas.job import Job
from schemas.report import Hardware

# Rows a replica holds, as a multiple of its sequences in flight: fewer, and the engine drains
# whenever a batch waits for its longest answer. (Simulated, answers of very different lengths: with
# 1.5 times as many, 36% of 350 sequences are at work.)
HELD_PER_SEQUENCE = 4
CPU_SEQUENCES = 16  # more would only be finished later
READ_CPUS = 0.25  # reading waits for storage: four reads share a core
RENDER_CPUS = 1.0  # rendering computes
# Others may hold for days what a node lacks; ranks on several nodes lose little to the links.
FOR_ONE_NODE_SECONDS = 120.0
BATCH_ROWS = 16  # at most: smaller batches are committed sooner, larger ones cost Ray less
BATCHES_IN_FLIGHT = 4  # at least

_KNOCK_SECONDS = 10.0  # for an answer of a cluster
_GPU_KIND = "accelerator_type:"  # how Ray names what kind of GPU a node has


@dataclass(frozen=True)
class Placement:
    """What each stage takes. A replica is one actor; its ranks are processes under it, or under
    RankHosts where no node has GPUs for all of them, or has them free."""

    device: Literal["cpu", "cuda"]
    ranks: int
    replicas: int
    gpus: int  # that Ray gives a replica's actor
    hosts: RankHosts | None  # take the GPUs instead, on several nodes
    prepare_workers: int
    prepare_cpus: float  # of a worker; together they leave a core for what comes before them
    read_cpus: float  # of a task that reads a unit
    threads: int | None  # of a rank on CPU
    max_sequences: int | None  # in flight in a replica; None: as many as its memory holds
    chunk_tokens: int  # computed together by a replica
    batch_rows: int  # rows of one call of a replica
    calls: int  # calls of a replica side by side

    def hardware(self) -> Hardware:
        """For the record of the run; asks the cluster that this process has joined."""
        kinds = [name for name in ray.cluster_resources() if name.startswith(_GPU_KIND)]
        return Hardware(
            device=self.device,
            ranks=self.ranks,
            replicas=self.replicas,
            prepare_workers=self.prepare_workers,
            gpu=kinds[0].removeprefix(_GPU_KIND) if kinds and self.device == "cuda" else None,
        )


@contextmanager
def ray_session(address: str) -> Iterator[None]:
    """Joins the cluster at `address`, or starts Ray on this machine, and leaves it at the end.

    Ray's own progress bars and log lines stay in its session folder. An error of a worker that
    ends the run is raised as what it was there: ConfigError, or else EngineError.
    """
    started = not ray.is_initialized()
    if started:
        try:
            _knock(address)
            _start_ray(address)
        except (ConnectionError, ValueError) as error:  # nobody there; no address at all
            raise ConfigError(
                f"no Ray cluster answers at {address!r}: {error}. Expected local (start Ray on this"
                " machine), auto, or the address of a running cluster."
            ) from error
        except Exception as error:  # Ray has no kind of its own for a node that starts too slowly
            raise StoppedError(
                f"Ray did not start: {error} On a busy machine, try again; Ray's own log is in"
                " /tmp/ray/session_latest/logs."
            ) from error
    _quieten_ray_data()
    try:
        yield
    except RayError as error:
        raise plain_error(error) from error
    finally:
        if started:
            ray.shutdown()


def plain_error(error: RayError) -> VL01Error:
    """The cause of a worker's error in one line, out of the tracebacks that Ray hands over as text.

    Python prints the cause before what it led to, so the first error named is the one.
    """
    named = re.search(r"^([\w.]*(?:Error|Exception)): (.*)$", str(error), re.MULTILINE)
    first_line = str(error).strip().partition("\n")[0]
    kind, message = named.groups() if named else (type(error).__name__, first_line)
    if kind.rpartition(".")[2] in (ConfigError.__name__, CheckpointError.__name__):
        return ConfigError(message)
    return EngineError(
        f"a worker failed: {kind}: {message} (--debug shows where). What is committed stays; "
        "the same command goes on from here."
    )


def _knock(address: str) -> None:
    """Raises ConnectionError where nobody listens, for which Ray would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()
    except OSError as error:
        raise ConnectionError(str(error)) from error


def _start_ray(address: str) -> None:
    # A harmless complaint per actor pool (Ray issue 53727) would reach the terminal from C++,
    # and so would the note that its level was changed.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name, value in GIVE_MEMORY_BACK.items():
        os.environ.setdefault(name, value)
    with _native_stderr_to(os.devnull):
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    # Ray prints the traceback of every task it tries again, whatever log_to_driver says.
    ray_worker._worker_logs_enabled = False


@contextmanager
def _native_stderr_to(path: str) -> Iterator[None]:
    """Sends what this process writes to file descriptor 2, from any language, to a file."""
    sys.stderr.flush()
    terminal, elsewhere = os.dup(2), os.open(path, os.O_WRONLY)
    os.dup2(elsewhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(elsewhere)


def place(job: Job, renders: bool = False) -> Placement:
    """Decides on the stages' shares of the cluster that this process has joined.

    renders: whether there are documents, whose pages are rendered while they are read.
    Raises ConfigError when the GPUs asked for are not there, held by others or not.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    on_gpu = job.device == "cuda" or (job.device == "auto" and sum(gpus) > 0)
    if on_gpu:
        replicas = _replicas_on_gpus(job, sum(gpus))
    else:
        replicas = len(cores) if job.replicas == "auto" else job.replicas
    hosts = _rank_hosts(job.pp, replicas, gpus) if on_gpu else None
    max_sequences = job.max_sequences or (None if on_gpu else CPU_SEQUENCES)
    sequences = max_sequences or MOST_SEQUENCES  # how many fit is known once the model is loaded
    batch_rows = min(BATCH_ROWS, -(-sequences // BATCHES_IN_FLIGHT))
    prepare_workers = job.prepare_workers or _prepare_workers(on_gpu, sum(cores), replicas, renders)
    prepare_cpus = _prepare_cpus(sum(cores), prepare_workers)
    return Placement(
        device="cuda" if on_gpu else "cpu",
        ranks=job.pp,
        replicas=replicas,
        gpus=job.pp if on_gpu and not hosts else 0,
        hosts=hosts,
        prepare_workers=prepare_workers,
        prepare_cpus=prepare_cpus,
        read_cpus=_read_cpus(sum(cores) - prepare_workers * prepare_cpus, renders),
        threads=None if on_gpu else _threads(cores, replicas, job.pp),
        max_sequences=max_sequences,
        chunk_tokens=job.chunk_tokens or usual_chunk_tokens(on_gpu=on_gpu, ranks=job.pp),
        batch_rows=batch_rows,
        calls=-(-HELD_PER_SEQUENCE * sequences // batch_rows),
    )


def _threads(cores: list[int], replicas: int, ranks: int) -> int:
    """Of a rank on CPU. cores: of each node; Ray spreads the replicas over the nodes."""
    return max(1, min(cores) // (ranks * -(-replicas // len(cores))))


def _prepare_workers(on_gpu: bool, cores: int, replicas: int, renders: bool) -> int:
    """All cores but one, which reads; half of them where there are pages to render, which takes as
    long as cutting them. On CPU the model needs them more: one per replica.
    """
    if on_gpu:
        return max(1, cores // 2 if renders else cores - 1)
    return min(replicas, max(1, cores - 1))


def _prepare_cpus(cores: int, workers: int) -> float:
    """What Ray counts for each: less than a core where they are many, so that one is left for the
    tasks that cut and read units: those would wait for ever.
    """
    return min(1.0, (cores - 1) * 1000 // workers / 1000)


def _read_cpus(cores_left: float, renders: bool) -> float:
    """Two tasks that render always fit: the next document need not wait for one of many pages."""
    return min(RENDER_CPUS, int(cores_left * 500) / 1000) if renders else READ_CPUS


def _replicas_on_gpus(job: Job, gpus: int) -> int:
    asked = 1 if job.replicas == "auto" else job.replicas
    if gpus < job.pp * asked:
        advice = "Lower --replicas or --pp, or add GPUs." if gpus else "--device cpu needs none."
        raise ConfigError(
            f"--replicas {job.replicas} times --pp {job.pp} takes GPUs: {job.pp * asked}; the"
            f" cluster has: {gpus}. {advice}"
        )
    return gpus // job.pp if job.replicas == "auto" else job.replicas


def _rank_hosts(ranks: int, replicas: int, gpus: list[int]) -> RankHosts | None:
    """gpus: of each node. None where every replica fits on one node, and could start there now; or
    where it could be nowhere else."""
    if _replicas_on_one_node(ranks, gpus) < replicas:
        return RankHosts(ranks)
    if ranks == 1 or max(gpus) == sum(gpus):
        return None
    free = [int(node.get("GPU", 0)) for node in available_resources_per_node().values()]
    if _replicas_on_one_node(ranks, free) < replicas:
        return RankHosts(ranks, FOR_ONE_NODE_SECONDS)
    return None


def _replicas_on_one_node(ranks: int, gpus: list[int]) -> int:
    return sum(node // ranks for node in gpus)


def _quieten_ray_data() -> None:
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, PlainRayHandler):  # the terminal's; others may be of the caller
            handler.setLevel(logging.CRITICAL)
    # `max_task_retries` reaches map_batches as an extra argument, which Ray 2.64 will refuse.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*deprecated")
    # A source of one unit leaves replicas idle: their number is the user's own wish.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def configure_ray_data(block_bytes: int) -> None:
    """Ray Data's settings that a long run over a large model needs, in this process."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = block_bytes
    context.execution_no_progress_timeout_s = -1  # loading 423 GiB takes longer than the default
    context.max_consecutive_actor_init_deaths = 3
    context.max_errored_blocks = 0  # more would drop whole blocks of rows
