"""One JSON Schema, ready for use: typed columns, what the engine may write, answers read back.

The subset of JSON Schema, whatever its draft, and what becomes of it in Arrow:

    object                                       struct     its properties; no others are taken
    array                                        list       items, minItems, maxItems
    string                                       string     minLength, maxLength, pattern
    string, format date                          date32
    string, format date-time                     timestamp  RFC 3339, with offset; kept in UTC
    integer                                      int64      minimum, maximum, exclusive or not
    number                                       float64    the same
    number, multipleOf 0.1, 0.01, ...            decimal128 never rounded; below 10^15
    boolean                                      bool
    enum, const: strings, integers or booleans   string, int64, bool

Each may be null: {"type": ["string", "null"]}, or anyOf with {"type": "null"}. A property that is
not required may be left out, which is null too. $ref to $defs, if nothing holds itself. Titles and
descriptions go into the prompt, other annotations and x-... are ignored, all else is refused.

What the engine writes is bounded where the schema is not: 1,000 characters a string, 100 items a
list, 18 digits an integer, 15 digits and 6 decimals a number.
"""

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft202012Validator, validator_for

from schemas.errors import ConfigError, Reason, RowError
from schemas.extraction.json_text import places, read_json
from schemas.extraction.kinds import Fields, Items, Kind, Span
from schemas.extraction.reader import Reader

_INDENT = "  "
_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")


def load_schema(text: str) -> "Extraction":
    """Raises ConfigError: a line for each keyword that cannot be used, by its path."""
    try:
        schema = read_json(text)
        text.encode()
        json.dumps(schema, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError("the schema has half of a surrogate pair, which is no text") from None
    except ValueError as error:
        raise ConfigError(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ConfigError("the schema is no JSON object; expected one with type and properties")
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
        return Extraction(Reader(schema).read())
    except SchemaError as error:
        path = "/".join(["#", *map(str, error.absolute_path)])
        problem = error.message
        if path.endswith("/type"):
            problem = f"{error.instance!r}; expected one of {', '.join(_TYPES)}"
        raise ConfigError(f"{path}: not valid in a JSON Schema: {problem}") from None
    except RecursionError:
        raise ConfigError("the schema is nested too deeply") from None


@dataclass(frozen=True)
class Extraction:
    """What is asked of each page. Picklable."""

    fields: Fields

    @property
    def arrow_type(self) -> pa.StructType:
        """Of the column `data`."""
        return self.fields.arrow

    @property
    def confidence_type(self) -> pa.DataType:
        """Of the column `confidence`: as `arrow_type`, with a float32 for each value."""
        return self.fields.confidence_type

    @property
    def json_schema(self) -> str:
        """What the engine may write, as JSON Schema without whitespace: `parse` takes all of it."""
        return self.fields.constraint_text()

    @property
    def description(self) -> str:
        """The fields for a prompt, a line for each."""
        return "\n".join(_lines(self.fields, ""))

    def parse(self, text: str) -> dict[str, Any]:
        """The answer, as Arrow takes it for `arrow_type`. Raises RowError, and nothing else."""
        try:
            found = read_json(text)
        except ValueError as error:
            message = f"not JSON: {error}".encode(errors="replace").decode()
            raise RowError(Reason.INVALID_JSON, message[:200]) from None
        return self.fields.value(found, "")

    def confidence(
        self, text: str, token_logprobs: Sequence[float], token_ends: Sequence[int]
    ) -> dict[str, Any]:
        """For each value of an answer that `parse` takes, the probability (0 to 1) of the least
        likely of its tokens.

        token_logprobs: of the text's tokens; token_ends: the length of the text after each.
        """

        def least(span: Span) -> float | None:
            first, last = span
            if text[first] == '"':
                first += 1  # the quote before a string says nothing of it, the one after it does
            start, end = bisect_right(token_ends, first), bisect_left(token_ends, last) + 1
            found = token_logprobs[start:end]
            return math.exp(min(found)) if found else None

        return self.fields.confidence(places(text), least)


def _lines(fields: Fields, indent: str) -> list[str]:
    lines = []
    for name, kind in fields.fields.items():
        optional = "" if kind.null or name in fields.required else ", if there is one"
        null = ", or null" if kind.null else ""
        about = f": {kind.about}" if kind.about else ""
        lines.append(f"{indent}- {name} ({kind.words}{null}{optional}){about}")
        lines += _lines_below(kind, indent + _INDENT)
    return lines


def _lines_below(kind: Kind, indent: str) -> list[str]:
    while isinstance(kind, Items):
        kind = kind.item
    return _lines(kind, indent) if isinstance(kind, Fields) else []
