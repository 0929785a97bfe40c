"""How long the work will take, from what is known of the speed; nothing is made up here."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.config import TextConfig
from pipeline.estimate.measured import TABLE, Bench, read_bench, read_json
from pipeline.ledger import Ledger
from pipeline.report.runs import run_records
from schemas.errors import ConfigError
from schemas.estimate import Assumptions, Throughput, TimeEstimate
from schemas.job import Job
from schemas.report import Hardware, RunRecord
from schemas.rows import Status

_RELEASED_LAYERS, _RELEASED_HIDDEN = 80, 6144  # the network that the table is of
_LATEST = 10  # runs that may tell the speed
_LEAST_WORK = 0.2  # of a run's seconds


def find_throughput(
    job: Job, text: TextConfig, ledger: Ledger | None, assumptions: Assumptions, prompt: float
) -> Throughput | None:
    """What the user says; else what a run on this output with as many ranks and replicas reached;
    else, for the released network on GPUs, what the table says. None when nothing is known.

    ledger: of the output, when it holds this job's rows. prompt: tokens of one, on average. Raises
    ConfigError when the file that should tell does not.
    """
    measured = _of_runs(job, run_records(ledger)[0].values(), "on this output") if ledger else None
    output_tokens = measured.output_tokens if measured else float(job.max_new_tokens)
    if assumptions.tokens_per_second is not None:
        gpus = 0 if job.device == "cpu" else job.pp * _replicas(job)
        origin = "--tokens-per-second" + _as_if_one(job) + _as_if(measured)
        return Throughput(assumptions.tokens_per_second, output_tokens, gpus, origin)
    if assumptions.bench is not None:
        return _of_file(job, text, Path(assumptions.bench), prompt, output_tokens, _as_if(measured))
    if measured or not _is_released(job, text):
        return measured
    table = next((bench for bench in TABLE if bench.quantization == job.quantization), None)
    return table and _of_bench(job, text, table, prompt, output_tokens, _as_if(measured))


def time_estimate(
    throughput: Throughput, prompt_tokens: int, rows: float, gpu_hour_price: float | None
) -> TimeEstimate:
    """For `rows` usable images with `prompt_tokens` in all."""
    tokens = prompt_tokens + rows * throughput.output_tokens
    seconds = throughput.start_seconds + tokens / throughput.tokens_per_second
    if not throughput.gpus:
        return TimeEstimate(seconds, None, None)
    gpu_hours = seconds / 3600 * throughput.gpus
    return TimeEstimate(
        seconds, gpu_hours, None if gpu_hour_price is None else gpu_hours * gpu_hour_price
    )


def _as_if(measured: Throughput | None) -> str:
    return "" if measured else "; as if every answer had --max-new-tokens"


def _is_released(job: Job, text: TextConfig) -> bool:
    size = text.num_layers, text.hidden_size
    return job.device != "cpu" and size == (_RELEASED_LAYERS, _RELEASED_HIDDEN)


def _of_file(
    job: Job, text: TextConfig, path: Path, prompt: float, output_tokens: float, as_if: str
) -> Throughput:
    values = read_json(path)
    if "workloads" in values:
        bench = read_bench(values, path)
        if bench.quantization != job.quantization:
            raise ConfigError(
                f"--bench {path} was measured with --quantization {bench.quantization}; the job has"
                f" {job.quantization}"
            )
        return _of_bench(job, text, bench, prompt, output_tokens, as_if)
    if found := _of_runs(job, _reported(values, path), f"of {path}"):
        return found
    raise ConfigError(
        f"--bench {path} tells of no run with --pp {job.pp} and --replicas {job.replicas}; expected"
        " what vl01 bench slice --json writes, or the report.json of such a run"
    )


def _of_bench(
    job: Job, text: TextConfig, bench: Bench, prompt: float, output_tokens: float, as_if: str
) -> Throughput:
    """Ranks share the layers: as many of them do as many times the work of one."""
    work = bench.nearest(prompt)
    on_gpus = bench.device != "CPU"
    gpus = job.pp * _replicas(job) if on_gpus else 0
    whole = work.tokens_per_second * bench.layers / text.num_layers * (gpus or 1)
    origin = (
        f"{bench.origin}: {bench.device}, workload {work.name}, {bench.layers} of"
        f" {text.num_layers} layers{f', times {gpus} GPUs' if gpus else ''}"
    )
    return Throughput(whole, output_tokens, gpus, origin + _as_if_one(job) + as_if)


def _reported(report: dict[str, Any], path: Path) -> list[RunRecord]:
    """The runs of a report.json. Raises ConfigError. Without what they copied: another source has
    other duplicates, if any."""
    try:
        return [
            RunRecord(
                run=run["run"],
                started_at=run["started_at"],
                finished_at="",
                seconds=run["seconds"],
                rows={Status.OK: run["rows"] - run["failed"], Status.FAILED: run["failed"]},
                prompt_tokens=run["prompt_tokens"] - run.get("copied_tokens", 0),
                output_tokens=run["output_tokens"],
                stage_seconds={},
                hardware=Hardware(**run["hardware"]) if run["hardware"] else None,
                start_seconds=run["start_seconds"],
            )
            for run in report["runs"]
        ]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"--bench {path} is no report of this version of vl01 ({error}); expected the JSON of"
            " vl01 bench slice, or a report.json"
        ) from error


def _of_runs(job: Job, runs: Iterable[RunRecord], where: str) -> Throughput | None:
    """Of the last runs that worked alike the one that did most: a short one tells of its start."""
    latest = sorted((run for run in runs if _alike(job, run)), key=lambda run: run.run)[-_LATEST:]
    if not latest:
        return None
    run = max(latest, key=lambda run: (_tokens(run), run.run))
    assert run.hardware
    start = run.start_seconds
    if run.seconds - start < _LEAST_WORK * run.seconds:
        start = 0.0  # too little came after the first rows to tell the pace
    return Throughput(
        tokens_per_second=_tokens(run) / (run.seconds - start),
        output_tokens=run.output_tokens / _answered(run),
        gpus=run.hardware.gpus,
        origin=f"run {run.run} {where}" + (f", after a start of {start:,.0f} s" if start else ""),
        start_seconds=start,
    )


def _alike(job: Job, run: RunRecord) -> bool:
    """Whether a run did something, as the job would do it."""
    if not (_tokens(run) and _answered(run) and run.seconds and run.hardware):
        return False
    if run.changed:  # a retry with longer answers, say
        return False
    same_device = job.device in ("auto", run.hardware.device)
    same_replicas = job.replicas in ("auto", run.hardware.replicas)
    return same_device and same_replicas and job.pp == run.hardware.ranks


def _replicas(job: Job) -> int:
    """No cluster is asked: of `auto`, whose GPU-hours are the same, the hours are of one."""
    return 1 if job.replicas == "auto" else job.replicas


def _as_if_one(job: Job) -> str:
    return "; as if --replicas auto were 1" if job.replicas == "auto" else ""


def _tokens(run: RunRecord) -> int:
    return run.prompt_tokens + run.output_tokens


def _answered(run: RunRecord) -> int:
    return sum(n for status, n in run.rows.items() if status != Status.FAILED)
