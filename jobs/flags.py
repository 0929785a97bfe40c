"""The flags of a task's command, made from the fields of Job: each key is written once, there."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.markup import escape

from jobs.config import TASKS, flag
from jobs.task import Task
from schemas.job import KEYS, RETRY_MAY_CHANGE, WHERE_AND_HOW_FAST

# For the commands that know an output and no job.
EndpointUrl = Annotated[
    str | None, typer.Option(help=KEYS["endpoint_url"].description, metavar="TEXT")
]

JobFile = Annotated[
    Path, typer.Argument(help="the job, in YAML; - is standard input", metavar="JOB.yaml")
]


def _ask_for_tracebacks(asked: bool) -> None:
    if asked:
        os.environ["VL01_DEBUG"] = "1"


Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="show the traceback of an error; so does VL01_DEBUG=1",
        callback=_ask_for_tracebacks,
        metavar="",
        expose_value=False,
        is_eager=True,
    ),
]

# The panel of the help that shows a key; a key in none of them stands with --help.
_PANELS = {
    "Input and output": "output image_column uri_column keep unit_rows grow settle_seconds "
    "max_pixels max_bytes decode_seconds exif_rotate endpoint_url",
    "Documents": "dpi max_pages page_seconds document_seconds documents markdown",
    "Lists of addresses": "allow_host fetch_seconds host_requests host_rate",
    "Model": "model quantization dtype device random_weights chunk_tokens max_sequences cache_gib",
    "Prompt and answer": "prompt system schema max_new_tokens temperature top_p seed stop "
    "stop_repetition retries skip_blank dedupe",
    "Cluster": "pp replicas prepare_workers address grace_seconds",
}
_PANEL_OF = {key: panel for panel, keys in _PANELS.items() for key in keys.split()}
# What a retry does not ask for; documents that were written once are kept up to date.
_NOT_OF_RETRIES = {"strict", "max_failure_rate", "grow", "settle_seconds", "documents", "markdown"}


def with_flags(task: Task, command: Callable[..., None]) -> Callable[..., None]:
    """`command(**values)` with a flag for every key of Job but `task`, `ladder` (which only a file
    can hold) and those of other tasks, ready for typer; other keyword parameters that it names
    stay.

    Values arrive as text, lists of text and bools: Job alone judges them, so that a wrong value
    reads the same in a flag as in a file.
    """
    hidden = {"task", "ladder", *(key for other in TASKS.values() for key in other.needs)} - {
        *task.needs
    }
    fields = {key: field for key, field in KEYS.items() if key not in hidden}
    return with_parameters(command, [_parameter(key, field, task) for key, field in fields.items()])


def with_changes(command: Callable[..., None]) -> Callable[..., None]:
    """The same with a flag for every key that a retry may change, and None for what is not given:
    as it was in the run before."""
    given = {*inspect.signature(command).parameters, *_NOT_OF_RETRIES}
    allowed = {*WHERE_AND_HOW_FAST, *RETRY_MAY_CHANGE} - given
    fields = {k: f for k, f in KEYS.items() if k in allowed}
    return with_parameters(command, [_change(key, field) for key, field in fields.items()])


def with_parameters(
    command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """`command(**values)` with these for typer, beside the keyword parameters that it names."""
    named = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters = parameters + [p.replace(kind=p.KEYWORD_ONLY) for p in named]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _change(key: str, field: FieldInfo) -> inspect.Parameter:
    value = _value_type(field.annotation)
    typed: Any = list[str] | None if get_origin(value) is tuple else str | None
    annotation = Annotated[typed, _shape(key, field, value)]
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None
    )


def _parameter(key: str, field: FieldInfo, task: Task) -> inspect.Parameter:
    default: Any = task.defaults.get(key, field.get_default())
    if key in task.needs:
        default = PydanticUndefined
    value = _value_type(field.annotation)
    typed: Any = str | None
    if value is bool:
        typed = bool
    elif get_origin(value) is tuple:
        typed, default = list[str], list(default)
    elif default is PydanticUndefined:
        typed, default = str, inspect.Parameter.empty
    elif default is not None:
        default = f"{default:g}" if value is float else str(default)
    return inspect.Parameter(
        key,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[typed, _shape(key, field, value, default)],
        default=default,
    )


def _shape(key: str, field: FieldInfo, value: Any, default: Any = None) -> Any:
    """How typer shows and reads it."""
    help_text = escape(field.description or "")
    if key == "source":
        return typer.Argument(help=help_text, metavar=flag(key))
    if get_origin(value) is tuple:
        help_text += "; may be repeated"
    return typer.Option(
        _names(key, value, default),
        help=help_text,
        metavar="" if value is bool else _metavar(field.annotation),
        rich_help_panel=_PANEL_OF.get(key),
    )


def _names(key: str, value: Any, default: Any) -> str:
    """What a task switches on by itself can be switched off."""
    return f"{flag(key)}/--no-{flag(key)[2:]}" if value is bool and default else flag(key)


def _value_type(annotation: Any) -> Any:
    """The bare type of a field: `Positive | None` is int."""
    while get_origin(annotation) not in (None, tuple, Literal):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    return annotation


def _metavar(annotation: Any) -> str:
    kind = get_origin(annotation)
    if kind is Literal:
        return "|".join(get_args(annotation))
    if kind is Annotated:
        return _metavar(get_args(annotation)[0])
    if kind in (Union, UnionType):
        return "|".join(_metavar(part) for part in get_args(annotation) if part is not NoneType)
    return {int: "INTEGER", float: "NUMBER"}.get(annotation, "TEXT")
