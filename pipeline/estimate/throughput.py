"""How long the work will take, from what is known of the speed; nothing is made up here."""

import json
from typing import Any

from pipeline.ledger import Ledger
from pipeline.storage import list_flat
from schemas.estimate import Assumptions, Throughput, TimeEstimate
from schemas.job import Job

# What decides the speed and may differ between two runs on one output.
_SPEED = ("device", "dtype", "pp", "replicas", "max_sequences", "chunk_tokens", "cache_gib")


def find_throughput(job: Job, ledger: Ledger | None, assumptions: Assumptions) -> Throughput | None:
    """What the user says; else what the last run on this output with the same settings reached.

    None when neither is known. ledger: of the output, when it holds this job's rows.
    """
    measured = _last_run(job, ledger) if ledger else None
    if assumptions.tokens_per_second is None:
        return measured
    written = measured.output_tokens if measured else job.max_new_tokens
    source = "from the last run" if measured else "at most (--max-new-tokens)"
    return Throughput(
        assumptions.tokens_per_second,
        written,
        f"--tokens-per-second; {written:,.0f} tokens written for a row, {source}",
    )


def time_estimate(
    throughput: Throughput, prompt_tokens: int, rows: float, job: Job, assumptions: Assumptions
) -> TimeEstimate:
    """For `rows` usable images with `prompt_tokens` in all."""
    tokens = prompt_tokens + rows * throughput.output_tokens
    seconds = tokens / throughput.tokens_per_second
    if job.device == "cpu":
        return TimeEstimate(seconds, None, None)
    gpu_hours = seconds / 3600 * job.pp * job.replicas
    price = assumptions.gpu_hour_price
    return TimeEstimate(seconds, gpu_hours, None if price is None else gpu_hours * price)


def _last_run(job: Job, ledger: Ledger) -> Throughput | None:
    """Of the runs told in _vl01/runs, whose names begin with their time."""
    for name in sorted(list_flat(ledger.fs, f"{ledger.root}/_vl01/runs"), reverse=True):
        if name.endswith(".json") and (found := _throughput(job, ledger, name)):
            return found
    return None


def _throughput(job: Job, ledger: Ledger, name: str) -> Throughput | None:
    try:
        told: dict[str, Any] = json.loads(ledger.read(f"runs/{name}"))
        settings, summary = told["job"], told["summary"]
        answered = sum(n for status, n in summary["rows"].items() if status != "failed")
        tokens = summary["prompt_tokens"] + summary["output_tokens"]
        speed = tokens / summary["seconds"]
        written = summary["output_tokens"] / answered
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None  # damaged, of another version, or of a run that did nothing
    if any(settings.get(key) != getattr(job, key) for key in _SPEED):
        return None
    run = name.removesuffix(".json")
    return Throughput(
        speed,
        written,
        f"run {run} on this output, its start included; {written:,.0f} tokens written for a row",
    )
