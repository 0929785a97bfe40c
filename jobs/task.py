"""What a task is: the name, the words and the defaults it brings to a job. Knows no task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """A command of its own, `vl01 NAME`, and a value of the key `task`.

    defaults: of the keys of `schemas.job.Job` for which the task knows better than Job does.
    examples: arguments that follow `vl01 NAME`, for its help.
    notes: paragraphs that follow the examples.
    needs: keys that must be given, and that no other task takes.
    complete: what it makes of the values that were given, whose relative paths start at a folder,
        before they become a Job. Raises ConfigError.
    """

    name: str
    summary: str
    defaults: Mapping[str, Any]
    examples: tuple[str, ...] = field(default=())
    notes: str = ""
    needs: tuple[str, ...] = ()
    complete: Callable[[dict[str, Any], Path], dict[str, Any]] = lambda values, _: values
