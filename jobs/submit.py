"""`vl01 submit`: runs a job on a Ray cluster, shows what it says there, returns its exit code.

Only talks to the cluster's job server; what the job does is the same `vl01 run` as anywhere.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from schemas.errors import ConfigError, ExitCode, StoppedError
from schemas.job import Job

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

HELP = """Run the job in a YAML file on a Ray cluster, and follow it from here.

Shows the progress of the run and returns its own exit code. Ctrl-C stops
following; the run goes on. Paths in the file are those of the cluster:
storage that all its nodes see, or addresses such as s3://bucket/folder.
`vl01` of the same version must be installed there.

ADDR is the cluster's job server, http://HEAD:8265. Where Ray asks for a
token, it is taken from RAY_AUTH_TOKEN, or from ~/.ray/auth_token.

[bold]Examples[/bold]
  vl01 submit job.yaml --address http://head:8265
  vl01 submit job.yaml --address http://head:8265 --no-wait

[bold]Exit codes[/bold]
  those of the run; 0 with --no-wait, 1 also if the run was killed, or went
  on when this command was stopped, 2 also if there is no such cluster"""

# The shell becomes `vl01`, which so gets the signals that Ray sends to the shell.
_ENTRYPOINT = "exec vl01 run - <<JOB\n$VL01_JOB\nJOB"
_COMMAND_NOT_FOUND = 127
_NOT_YET = "No available agent"  # of a cluster in its first seconds
_START_SECONDS = 60.0
_LOST_SECONDS = 300.0  # of trying to reach the cluster again, before giving up on following
_RETRY_SECONDS = 5.0

T = TypeVar("T")


def submit(job: Job, address: str, wait: bool, show: Callable[[str], None]) -> int:
    """Starts the run, and with `wait` follows it to its end. Returns the exit code.

    show: takes what the run writes, as it comes. Raises ConfigError if the cluster cannot be
    reached or refuses, StoppedError if the run was killed there or is lost sight of.
    """
    client = _connect(address)
    name = _start(client, job)
    show(f"submitted as {name}; `ray job stop {name}` stops it, the next run resumes it\n")
    if not wait:
        return ExitCode.OK
    try:
        details = _follow(client, name, show)
    except KeyboardInterrupt:
        raise StoppedError(
            f"no longer following {name}, which goes on; vl01 status {job.output} tells of it"
        ) from None
    return _exit_code(details, name)


def _connect(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    if ":" in address and "://" not in address:
        address = f"http://{address}"  # Ray would look for its own server there, for 40 s
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # connection, address and authentication errors of many classes
        _refuse(address, error)


def _start(client: "JobSubmissionClient", job: Job) -> str:
    # There, `auto` is the cluster that runs the job.
    remote = job.model_copy(update={"address": "auto"}).model_dump(mode="json")
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=_ENTRYPOINT,
                runtime_env={"env_vars": {"VL01_JOB": json.dumps(remote, ensure_ascii=False)}},
                metadata={"output": job.output},
            )
        except Exception as error:
            if _NOT_YET not in str(error) or time.monotonic() > deadline:
                _refuse(client.get_address(), error)
            time.sleep(_RETRY_SECONDS)


def _refuse(address: str, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split()).rstrip(".")
    raise ConfigError(
        f"cannot submit to {address}: {reason}. Expected the address of a cluster's job server, "
        "such as http://head:8265"
    ) from error


def _follow(client: "JobSubmissionClient", name: str, show: Callable[[str], None]) -> "JobDetails":
    """Shows the run's output until its end, across breaks of the connection."""
    shown, heard = 0, time.monotonic()

    async def tail() -> None:
        nonlocal shown, heard
        seen = 0  # each connection begins with the first line again
        async for text in client.tail_job_logs(name):
            heard = time.monotonic()
            new = text[max(0, shown - seen) :]
            seen += len(text)
            if new:
                show(new)
                shown = seen

    while True:
        _patiently(lambda: asyncio.run(tail()), name, lambda: heard)
        details = _patiently(lambda: client.get_job_info(name), name)
        if details.status.is_terminal():
            return details
        time.sleep(_RETRY_SECONDS)


def _patiently(ask: Callable[[], T], name: str, heard: Callable[[], float] = lambda: 0.0) -> T:
    """What `ask` gives, once the cluster answers again. heard: when it last did, of an `ask` that
    may go well for hours before it fails. Raises StoppedError."""
    began = time.monotonic()
    while True:
        try:
            return ask()
        except Exception as error:  # of the HTTP client, the socket, the job server
            if time.monotonic() > max(began, heard()) + _LOST_SECONDS:
                raise StoppedError(f"lost sight of {name}, which may go on: {error}") from error
            time.sleep(_RETRY_SECONDS)


def _exit_code(details: "JobDetails", name: str) -> int:
    code: Any = details.driver_exit_code
    if code == _COMMAND_NOT_FOUND:
        raise ConfigError(f"{name}: there is no `vl01` on the cluster; install vl01-batch there")
    if code is None or code < 0 or code > ExitCode.UNACCOUNTED:
        why = " ".join((details.message or str(details.status)).split())
        raise StoppedError(f"{name} ended without an exit code of its own: {why}")
    return code
