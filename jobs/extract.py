"""The extract task: what is asked of a page when fields are wanted, and where a schema is found."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from jobs import ladder
from jobs.task import Task
from schemas.errors import ConfigError

SHIPPED = ("invoice", "receipt", "form", "table")
FIELDS = "{fields}"  # in a prompt: the fields of the schema, a line for each


def is_content(schema: str) -> bool:
    """Whether it is a schema, and no path or name of one: as a job is stored and sent."""
    return schema.lstrip().startswith("{")


def complete(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With the schema itself in place of its path, and its fields in the prompt: what is stored
    with a run needs no file any more. Raises ConfigError."""
    schema, prompt = values["schema"], values["prompt"]
    if not isinstance(schema, str) or not isinstance(prompt, str):
        return values  # Job says what is wrong with it
    from schemas.extraction import load_schema  # only now: help and usage errors come at once

    text = _read(schema, folder)
    try:
        asked = load_schema(text)
    except ConfigError as error:
        name = "schema" if is_content(schema) else schema
        raise ConfigError("\n".join(f"{name}: {line}" for line in str(error).split("\n"))) from None
    compact = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    return values | {"schema": compact, "prompt": prompt.replace(FIELDS, asked.description)}


def _read(schema: str, folder: Path) -> str:
    if is_content(schema):
        return schema
    if schema in SHIPPED:
        return files("jobs").joinpath("schemas", f"{schema}.json").read_text("utf-8")
    try:
        return (folder / os.path.expanduser(schema)).read_text("utf-8")
    except OSError as error:
        known = f"expected a JSON Schema file, or one of {', '.join(SHIPPED)}"
        raise ConfigError(f"cannot read schema {schema}: {error.strerror}; {known}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"schema {schema} is not text in UTF-8; expected JSON") from None


_NOTES = """[bold]Schemas[/bold]
  --schema is a JSON Schema file, or a name: invoice, receipt, form, table.
  The column data becomes a struct of its fields, the column confidence the
  probability of the least likely token of each. Of JSON Schema are usable:

  object              properties, required; nothing else is let in
  array               items, minItems, maxItems
  string              minLength, maxLength, pattern; format date (a date)
                      and date-time (a timestamp in UTC)
  integer             minimum, maximum, exclusiveMinimum, exclusiveMaximum
  number              the same; with multipleOf 0.01 (0.1, ...) a decimal
  boolean
  enum, const         of strings, integers or booleans
  type \\[string, null] and anyOf with null, for what may be missing
  $ref                to $defs, not to itself
  title, description  go into the prompt

  What has no bound is given one: 1,000 characters, 100 items, 15 digits
  and 6 decimals. {fields} in --prompt stands for the fields."""

TASK = Task(
    name="extract",
    summary="Read fields from every page, into typed columns.",
    defaults={
        "stop_repetition": True,
        "ladder": ladder.FIELDS,
        "skip_blank": True,
        "prompt": (
            "Read these fields from the page:\n"
            f"{FIELDS}\n"
            "Answer with one JSON object on one line, without spaces between its parts and without "
            "any other words. Copy text exactly as it is printed. Write numbers with a point and "
            "without separators of thousands, dates as YYYY-MM-DD. Where the page does not say "
            "something, write null if that is allowed. Invent nothing."
        ),
        "max_new_tokens": 2048,  # an invoice of thirty lines is about 1,500 tokens
    },
    examples=(
        "invoices --output fields --schema invoice --model /models/vl01",
        "'scans/*.jpg' --output fields --schema policy.json \\\n"
        "      --model /models/vl01 --pp 4 --replicas 2",
        "pages.parquet --output tables --schema table \\\n"
        "      --model /models/vl01 \\\n"
        "      --prompt 'Read the largest table of the page: {fields}'",
    ),
    notes=_NOTES,
    needs=("schema",),
    complete=complete,
)
