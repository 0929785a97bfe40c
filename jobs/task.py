"""What a task is: the name, the words and the defaults it brings to a job. Knows no task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """A command of its own, `vl01 NAME`, and a value of the key `task`.

    defaults: of the keys of `schemas.job.Job` for which the task knows better than Job does.
    examples: arguments that follow `vl01 NAME`, for its help.
    """

    name: str
    summary: str
    defaults: Mapping[str, Any]
    examples: tuple[str, ...] = field(default=())
