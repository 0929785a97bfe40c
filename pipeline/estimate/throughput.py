"""How long the work will take, from what is known of the speed; nothing is made up here."""

from pipeline.ledger import Ledger
from pipeline.storage import list_flat
from schemas.errors import LedgerError
from schemas.estimate import Assumptions, Throughput, TimeEstimate
from schemas.job import Job
from schemas.report import Hardware, RunRecord
from schemas.rows import Status


def find_throughput(job: Job, ledger: Ledger | None, assumptions: Assumptions) -> Throughput | None:
    """What the user says; else what the last run on this output with as many ranks and replicas
    reached. None when neither is known.

    ledger: of the output, when it holds this job's rows.
    """
    measured = _last_run(job, ledger) if ledger else None
    if assumptions.tokens_per_second is None:
        return measured
    gpus = 0 if job.device == "cpu" else job.pp * job.replicas
    origin = "--tokens-per-second"
    if measured:
        return Throughput(assumptions.tokens_per_second, measured.output_tokens, gpus, origin)
    origin += "; as if every answer had --max-new-tokens"
    return Throughput(assumptions.tokens_per_second, job.max_new_tokens, gpus, origin)


def time_estimate(
    throughput: Throughput, prompt_tokens: int, rows: float, gpu_hour_price: float | None
) -> TimeEstimate:
    """For `rows` usable images with `prompt_tokens` in all."""
    tokens = prompt_tokens + rows * throughput.output_tokens
    seconds = tokens / throughput.tokens_per_second
    if not throughput.gpus:
        return TimeEstimate(seconds, None, None)
    gpu_hours = seconds / 3600 * throughput.gpus
    return TimeEstimate(
        seconds, gpu_hours, None if gpu_hour_price is None else gpu_hours * gpu_hour_price
    )


def _last_run(job: Job, ledger: Ledger) -> Throughput | None:
    """Of the runs told in _vl01/runs, whose names begin with their time."""
    for name in sorted(list_flat(ledger.fs, f"{ledger.root}/_vl01/runs"), reverse=True):
        if name.endswith(".json") and (found := _throughput(job, ledger, name)):
            return found
    return None


def _throughput(job: Job, ledger: Ledger, name: str) -> Throughput | None:
    """None when the run did nothing, ran otherwise, or its record is of another version."""
    try:
        run = RunRecord.from_json(ledger.read(f"runs/{name}"), name)
    except LedgerError:
        return None
    tokens = run.prompt_tokens + run.output_tokens
    answered = sum(n for status, n in run.rows.items() if status != Status.FAILED)
    if not (tokens and answered and run.seconds and run.hardware and _alike(job, run.hardware)):
        return None
    return Throughput(
        tokens_per_second=tokens / run.seconds,
        output_tokens=run.output_tokens / answered,
        gpus=run.hardware.gpus,
        origin=f"run {run.run} on this output, its start included",
    )


def _alike(job: Job, hardware: Hardware) -> bool:
    same_device = job.device in ("auto", hardware.device)
    return same_device and (job.pp, job.replicas) == (hardware.ranks, hardware.replicas)
