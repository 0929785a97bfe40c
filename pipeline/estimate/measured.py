"""How fast the engine is, as `vl01 bench slice` measured it: in a file, or here in the table that
comes with the project.
"""

import json
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError


@dataclass(frozen=True)
class Workload:
    """`requests` of `prompt` tokens and `new` tokens of answer took `seconds` on one device."""

    name: str
    requests: int
    prompt: int
    new: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.requests * (self.prompt + self.new) / self.seconds


@dataclass(frozen=True)
class Bench:
    """A slice of `layers` layers on one device. origin: where the figures are from."""

    device: str
    quantization: str
    layers: int
    workloads: tuple[Workload, ...]
    origin: str

    def nearest(self, prompt: float) -> Workload:
        """The workload whose prompts are most like prompts of that many tokens."""
        return min(self.workloads, key=lambda work: abs(log(work.prompt / max(prompt, 1))))


# README, "Measured": vl01 bench slice, torch 2.11, the best of its runs.
TABLE = (
    Bench(
        device="NVIDIA H100 80GB HBM3",
        quantization="int8",
        layers=8,
        workloads=(
            Workload("coco640x480", 128, 2400, 128, 7.43),
            Workload("page-a4", 32, 8080, 256, 7.98),
            Workload("decode", 128, 64, 256, 5.20),
        ),
        origin="the table that comes with the project, 2026-11-24",
    ),
    Bench(
        device="NVIDIA H100 80GB HBM3",
        quantization="int8-dynamic",
        layers=8,
        workloads=(
            Workload("coco640x480", 128, 2400, 128, 5.09),
            Workload("page-a4", 32, 8080, 256, 6.10),
        ),
        origin="the table that comes with the project, 2026-11-24",
    ),
)


def read_bench(values: dict[str, Any], path: Path) -> Bench:
    """What `vl01 bench slice --json` wrote to `path`. Raises ConfigError when it cannot tell the
    speed of a released model."""
    try:
        settings = values["settings"]
        if settings["width"] != "released":
            raise ConfigError(
                f"--bench {path} was measured with --width {settings['width']}; expected released"
            )
        workloads = tuple(
            Workload(
                *(work["workload"][key] for key in ("name", "requests", "prompt", "new")),
                seconds=work["seconds"],
            )
            for work in values["workloads"]
        )
        layers, quantization = settings["layers"], settings["quantization"]
        return Bench(values["device"], quantization, layers, workloads, str(path))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"--bench {path} lacks {error}; expected what vl01 bench slice --json writes"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read --bench {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--bench {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--bench {path} holds no object; expected a bench's JSON or report.json")
    return values
