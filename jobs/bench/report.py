"""Measurements as tables for people and as JSON for programs."""

import dataclasses
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from jobs.bench.ceilings import Ceilings
from jobs.bench.error import ModeError
from jobs.bench.slice import Measurement, SliceSettings


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def show_device(device: torch.device, ceilings: Ceilings) -> None:
    _console().print(
        f"{device_name(device)}, torch {torch.__version__}; at best, measured here: "
        f"{ceilings.matmul / 1e12:,.2f} TFLOP/s (product), {ceilings.copy / 1e12:.2f} TB/s (copy)"
    )


def show(measurement: Measurement, ceilings: Ceilings) -> None:
    """One workload: a column of rates, then where its time goes."""
    workload = measurement.workload
    table = Table(
        "",
        f"{workload.requests} x {workload.prompt} + {workload.new} tokens",
        title=workload.name,
        title_justify="left",
    )
    for name, value in _rates(measurement, ceilings).items():
        table.add_row(name, value)
    whole = sum(measurement.families.values())
    for name, seconds in measurement.families.items():
        table.add_row(f"  {name}", f"{seconds:.3f} s, {seconds / whole:.1%}")
    _console().print(table)


def show_errors(errors: list[ModeError]) -> None:
    """A row for each quantization, against the same model in bf16."""
    table = Table("quantization", "error of a layer, mean", "worst", "of the logits", "same token")
    for error in errors:
        table.add_row(
            error.mode,
            f"{sum(error.layers) / len(error.layers):.3%}",
            f"{max(error.layers):.3%}",
            f"{error.logits:.2%}",
            f"{error.greedy:.1%}",
        )
    _console().print(table)


def as_json(
    settings: SliceSettings,
    device: torch.device,
    ceilings: Ceilings,
    measurements: list[Measurement],
) -> dict[str, Any]:
    """Plain numbers: seconds, bytes, FLOP and the rates made of them."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "settings": dataclasses.asdict(settings),
        "matmul_flops_per_second": ceilings.matmul,
        "copy_bytes_per_second": ceilings.copy,
        "workloads": [_workload_json(measurement, ceilings) for measurement in measurements],
    }


def _workload_json(measurement: Measurement, ceilings: Ceilings) -> dict[str, Any]:
    moved = measurement.bytes_per_second
    return {
        **dataclasses.asdict(measurement),
        "requests_per_second": measurement.requests_per_second,
        "prompt_tokens_per_second": measurement.prompt_tokens_per_second,
        "output_tokens_per_second": measurement.output_tokens_per_second,
        "flops_per_second": measurement.flops_per_second,
        "share_of_matmul": measurement.flops_per_second / ceilings.matmul,
        "bytes_per_second": moved,
        "share_of_copy": moved and moved / ceilings.copy,
    }


def _rates(measurement: Measurement, ceilings: Ceilings) -> dict[str, str]:
    runs = ", ".join(f"{seconds:.2f}" for seconds in measurement.runs)
    flops = measurement.flops_per_second
    rates = {
        "seconds": f"{measurement.seconds:.2f} (runs: {runs})",
        f"{measurement.workload.what}/s": f"{measurement.requests_per_second:.2f}",
        "prompt tokens/s": f"{measurement.prompt_tokens_per_second:,.0f}",
        "output tokens/s": f"{measurement.output_tokens_per_second:,.0f}",
        "TFLOP/s": f"{flops / 1e12:,.2f}, {flops / ceilings.matmul:.1%} of the product",
    }
    if moved := measurement.bytes_per_second:
        rates["GB/s"] = f"{moved / 1e9:,.1f}, {moved / ceilings.copy:.1%} of the copy"
    rates["microbatches"] = f"{measurement.microbatches:,}"
    if measurement.peak_bytes:
        rates["peak memory"] = f"{measurement.peak_bytes / 2**30:.1f} GiB"
    return rates


def _console() -> Console:
    return Console(highlight=False)
