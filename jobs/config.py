"""From what a user wrote, in flags or in a YAML file, to a Job; every mistake in it is one line.

Knows keys and values; whether paths, checkpoint and hardware are really there is for `pipeline`.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jobs import caption, extract, ocr
from jobs.extract import is_content
from jobs.task import Task
from schemas.errors import ConfigError
from schemas.job import KEYS, RETRY_MAY_CHANGE, Job
from schemas.ladder import Step

TASKS: dict[str, Task] = {task.name: task for task in (caption.TASK, ocr.TASK, extract.TASK)}

ADDRESSES = ("source", "output", "model")  # keys that hold a local path or an fsspec address
PATHS = (*ADDRESSES, "schema")


def job_from_flags(task: Task, values: Mapping[str, Any]) -> Job:
    """The job of a command line; values by Job's keys. Relative paths start at the working folder.

    Raises ConfigError, which names the flags.
    """
    return _make_job(dict(values) | {"task": task.name}, Path.cwd(), flag)


def job_from_file(path: str | Path) -> Job:
    """The job in a YAML file: a mapping of Job's keys.

    Its relative paths start at the folder of the file, so that the file means the same wherever
    it is run from. `~` and `$VARIABLE` are filled in in its paths. The path `-` is standard
    input; its relative paths start at the working folder.
    Raises ConfigError, which names the file and the keys.
    """
    path = Path(path)
    values = _read_yaml(path)
    try:
        values = values | {
            key: _fill_variables(key, values[key])
            for key in PATHS
            if isinstance(values.get(key), str) and not is_content(values[key])
        }
        return _make_job(values, path.absolute().parent, str)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from None


def job_of_retry(
    stored: Mapping[str, Any], output: str, changes: Mapping[str, str | None]
) -> tuple[Job, dict[str, Any]]:
    """The job of an output, as job.json keeps it, with what a retry changes of where and how fast
    it runs; and those of RETRY_MAY_CHANGE that are others for the rows of this retry.

    Raises ConfigError, which names the flags.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    asked = _make_job({**stored, **given, "output": output}, Path.cwd(), flag)
    was = {key: stored[key] for key in RETRY_MAY_CHANGE}
    changed = {key: getattr(asked, key) for key in was if getattr(asked, key) != was[key]}
    return asked.model_copy(update=was), changed


def flag(key: str) -> str:
    """How a user of the command line knows a key of Job."""
    return "SOURCE" if key == "source" else "--" + key.replace("_", "-")


def _make_job(values: dict[str, Any], folder: Path, name: Callable[[str], str]) -> Job:
    """name: how the user knows a key. Raises ConfigError, one line for each mistake."""
    task = TASKS.get(str(values.get("task")), caption.TASK)  # Job refuses a task it does not know
    values = dict(task.defaults) | values
    _check_keys(task, values, name)
    values = task.complete(values, folder)
    try:
        job = Job.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error.errors(), name))) from None
    return job.model_copy(
        update={key: absolute_address(getattr(job, key), folder) for key in ADDRESSES}
    )


def _check_keys(task: Task, values: Mapping[str, Any], name: Callable[[str], str]) -> None:
    for other in TASKS.values():
        for key in other.needs:
            given = values.get(key) is not None
            if given and other is not task:
                raise ConfigError(f"{name(key)} is for {other.name} only; the task is {task.name}")
            if not given and other is task:
                raise ConfigError(f"{name(key)} is missing: {KEYS[key].description}")


def absolute_address(address: str, folder: Path) -> str:
    """A local path made absolute, `~` filled in; an address with a scheme (`s3://`) as it is."""
    if "://" in address:
        return address
    return os.path.abspath(folder / os.path.expanduser(address))


def _lines(errors: list[ErrorDetails], name: Callable[[str], str]) -> list[str]:
    """A line for each mistake: a list is not also called too short for an item that is wrong."""
    places = [details["loc"] for details in errors]
    return [
        _explain(details, name)
        for details in errors
        if not (
            details["type"] == "too_short"
            and any(details["loc"] == place[:-1] for place in places if place)
        )
    ]


def _explain(details: ErrorDetails, name: Callable[[str], str]) -> str:
    """One line for one of pydantic's complaints."""
    key, *place = details["loc"]
    key = str(key)
    if details["type"] == "extra_forbidden" and not place:
        return _unknown_key(key)
    where = name(key) + "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in place)
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), Step.model_fields, n=1)
        known = (
            f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(Step.model_fields)
        )
        return f"{where} is not known; {known}"
    if details["type"] == "missing":
        return f"{where} is missing" + (f": {KEYS[key].description}" if not place else "")
    # "Input should be a valid integer, unable to parse ...": what is wanted is in the middle.
    wanted = re.sub(r"^.* should |, (unable|got) .*$", "", details["msg"]).replace("tuple", "list")
    if details["type"] == "tuple_type":  # of a key whose flag is given once for each value
        wanted = "be a list: " + ("[]" if details["input"] is None else f"[{details['input']}]")
    return f"{where} is {details['input']!r}; it should {wanted}"


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), KEYS, n=1)
    advice = f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(KEYS)
    return f"unknown key {key!r}; {advice}"


class _Loader(yaml.SafeLoader):
    """YAML without surprises: a key given twice is an error, not the later one's victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"{node.start_mark.name}: {', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with nullcontext(sys.stdin) if path == Path("-") else path.open(encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; expected a job file in YAML"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8; expected a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line} is not YAML: {problem}") from None
    except ValueError as error:  # of a value that only looks like a date: 2024-13-45
        raise ConfigError(f"{path} holds a value that is none: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no job; expected lines such as 'source: photos'")
    return {str(key): value for key, value in values.items()}


def _fill_variables(key: str, address: str) -> str:
    filled = os.path.expandvars(address)
    left = re.search(r"\$(\w+|\{\w+\})", filled)
    if left:
        raise ConfigError(f"{key} is {address!r}, but {left.group()} is not set")
    return filled
