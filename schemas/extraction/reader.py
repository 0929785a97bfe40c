"""Reads a JSON Schema into kinds of values, and tells every keyword that it cannot use."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher

from schemas.errors import ConfigError
from schemas.extraction.dates import Date, Moment
from schemas.extraction.kinds import Boolean, Choice, Fields, Items, Kind, Text
from schemas.extraction.numbers import INT64, MOST_DECIMALS, Fixed, Integer, Number

MOST_KINDS = 1000  # in one schema, with every $ref written out
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "$defs", "definitions"),
}
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {*_BOUNDS},
    "number": {*_BOUNDS, "multipleOf"},
    "boolean": set(),
}
_KNOWN = set().union(*_KEYWORDS.values())
_JSON_TYPES = {str: "string", int: "integer", bool: "boolean"}
_A_VALUE = (
    "a value is given by one type (object, array, string, integer, number, boolean; beside null in"
    " a list), enum, const, anyOf of a value and null, or $ref to #/$defs"
)
_ESCAPED = re.compile(r"\\.")
_UNCLEAR = re.compile(r"\[\^?\]?[^\]]*?(\[|&&|--|~~)")  # in a class of characters
_STAND_IN = Boolean()  # for what cannot be used, so that the rest is still looked at


class Reader:
    """Of one schema. problems: one line for each keyword that cannot be used, by its path."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        self._root = schema
        self._kinds = 0
        self._open: list[str] = []  # the $refs that are being followed

    def read(self) -> Fields:
        """Raises ConfigError, with all problems."""
        kind = self._kind(self._root, "#")
        if not self.problems and not (isinstance(kind, Fields) and not kind.null):
            self._refuse("#/type", "the schema must be of an object, whose fields are extracted")
        if self.problems:
            raise ConfigError("\n".join(self.problems))
        assert isinstance(kind, Fields)
        return kind

    def _refuse(self, at: str, why: str) -> Kind:
        if (problem := f"{at}: {why}") not in self.problems:
            self.problems.append(problem)
        return _STAND_IN

    def _kind(self, schema: Any, at: str) -> Kind:
        self._kinds += 1
        if self._kinds > MOST_KINDS:
            raise ConfigError(f"the schema has more than {MOST_KINDS:,} values; make it smaller")
        if not isinstance(schema, Mapping):
            return self._refuse(at, _A_VALUE)
        for keyword, read in (
            ("$ref", self._reference),
            ("anyOf", self._value_or_null),
            ("enum", self._choice),
            ("const", self._choice),
        ):
            if keyword in schema:
                return read(schema, at)
        return self._typed(schema, at)

    def _typed(self, schema: Mapping[str, Any], at: str) -> Kind:
        if "type" not in schema:
            unknown = (name for name in schema if name not in _KNOWN and not _is_annotation(name))
            return self._refuse(f"{at}/{_escape(next(unknown, 'type'))}", _A_VALUE)
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        names = [name for name in types if name != "null"]
        if len(names) != 1:
            return self._refuse(f"{at}/type", _A_VALUE)
        self._allow(schema, at, {"type", *_KEYWORDS[names[0]]}, f"of {names[0]}")
        common = {"null": "null" in types, "about": _about(schema)}
        match names[0]:
            case "object":
                return self._object(schema, at, common)
            case "array":
                return self._array(schema, at, common)
            case "boolean":
                return Boolean(**common)
            case "integer":
                kind = Integer(bounds=_bounds(schema), **common)
            case "number":
                kind = self._number(schema, at, common)
            case _:
                kind = self._string(schema, at, common)
        if error := LLMatcher.validate_grammar(
            LLMatcher.grammar_from_json_schema(kind.constraint_text())
        ):
            self._refuse(at, f"no answer can be held to it: {' '.join(error.split())}")
        return kind

    def _object(self, schema: Mapping[str, Any], at: str, common: dict[str, Any]) -> Kind:
        fields = schema.get("properties", {})
        if not fields:
            return self._refuse(f"{at}/properties", "expected the object's fields")
        if schema.get("additionalProperties", False) is not False:
            self._refuse(f"{at}/additionalProperties", "only false: the columns are those named")
        self._check_names(fields, at)
        for name in schema.get("required", []):
            if name not in fields:
                self._refuse(f"{at}/required", f"{name!r} is not among the properties")
        kinds = {
            name: self._kind(field, f"{at}/properties/{_escape(name)}")
            for name, field in fields.items()
        }
        return Fields(fields=kinds, required=frozenset(schema.get("required", [])), **common)

    def _check_names(self, fields: Mapping[str, Any], at: str) -> None:
        known: dict[str, str] = {}
        for name in fields:
            if not name:
                self._refuse(f"{at}/properties", "a field without a name is no column")
            other = known.setdefault(name.lower(), name)
            if other != name:
                why = f"differs from {other!r} in case only, which SQL does not tell apart"
                self._refuse(f"{at}/properties/{_escape(name)}", why)

    def _array(self, schema: Mapping[str, Any], at: str, common: dict[str, Any]) -> Kind:
        if "items" not in schema:
            return self._refuse(f"{at}/items", "expected the schema of the items")
        if schema.get("minItems", 0) > schema.get("maxItems", math.inf):
            return self._refuse(f"{at}/minItems", "more than maxItems")
        return Items(
            item=self._kind(schema["items"], f"{at}/items"),
            least=int(schema.get("minItems", 0)),
            most=_count(schema.get("maxItems")),
            **common,
        )

    def _string(self, schema: Mapping[str, Any], at: str, common: dict[str, Any]) -> Kind:
        if "format" not in schema:
            if unclear := _unclear(schema.get("pattern", "")):
                why = f"{unclear} within [...] is not usable; escape it, or write the class out"
                self._refuse(f"{at}/pattern", why)
            return Text(
                min_length=int(schema.get("minLength", 0)),
                max_length=_count(schema.get("maxLength")),
                pattern=schema.get("pattern"),
                **common,
            )
        kinds = {"date": Date, "date-time": Moment}
        if schema["format"] not in kinds:
            why = "only date and date-time; pattern describes other texts, and a number with "
            return self._refuse(f"{at}/format", why + "multipleOf 0.01 is a decimal")
        for keyword in ("minLength", "maxLength", "pattern"):
            if keyword in schema:
                self._refuse(f"{at}/{keyword}", f"not beside format {schema['format']}")
        return kinds[schema["format"]](**common)

    def _number(self, schema: Mapping[str, Any], at: str, common: dict[str, Any]) -> Kind:
        if "multipleOf" not in schema:
            return Number(bounds=_bounds(schema), **common)
        steps = {Decimal(1).scaleb(-decimals): decimals for decimals in range(1, MOST_DECIMALS + 1)}
        decimals = steps.get(Decimal(schema["multipleOf"]))
        if decimals is None:
            why = f"only 0.1, 0.01, ... of at most {MOST_DECIMALS} decimals, for a decimal number"
            return self._refuse(f"{at}/multipleOf", why)
        return Fixed(bounds=_bounds(schema), decimals=decimals, **common)

    def _choice(self, schema: Mapping[str, Any], at: str) -> Kind:
        """enum or const."""
        keyword = "enum" if "enum" in schema else "const"
        self._allow(schema, at, {"type", keyword}, f"beside {keyword}")
        values = schema["enum"] if keyword == "enum" else [schema["const"]]
        choices = [value for value in values if value is not None]
        types = {_JSON_TYPES.get(type(value)) for value in choices}
        if len(types) != 1 or None in types:
            why = "expected strings, integers or booleans, all of one type, and null if need be"
            return self._refuse(f"{at}/{keyword}", why)
        large = [n for n in choices if isinstance(n, int) and not -INT64 <= n < INT64]
        if large:
            return self._refuse(f"{at}/{keyword}", f"{large[0]} is no integer of 64 bits")
        told = schema.get("type", [*types, "null"])
        told = told if isinstance(told, list) else [told]
        if not types <= set(told):
            return self._refuse(f"{at}/type", f"the values of {keyword} are of type {types.pop()}")
        null = len(choices) < len(values) and "null" in told
        return Choice(choices=tuple(dict.fromkeys(choices)), null=null, about=_about(schema))

    def _value_or_null(self, schema: Mapping[str, Any], at: str) -> Kind:
        self._allow(schema, at, {"anyOf"}, "beside anyOf")
        branches = list(enumerate(schema["anyOf"]))
        values = [(i, branch) for i, branch in branches if not _is_null(branch)]
        if len(branches) != 2 or len(values) != 1:
            return self._refuse(f"{at}/anyOf", 'expected a value and {"type": "null"}')
        position, branch = values[0]
        kind = self._kind(branch, f"{at}/anyOf/{position}")
        return _with(kind, null=True, about=_about(schema) or kind.about)

    def _reference(self, schema: Mapping[str, Any], at: str) -> Kind:
        self._allow(schema, at, {"$ref"}, "beside $ref")
        pointer = str(schema["$ref"])
        match = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", pointer)
        name = match[2].replace("~1", "/").replace("~0", "~") if match else ""
        if not match or name not in self._root.get(match[1], {}):
            return self._refuse(f"{at}/$ref", f"{pointer!r} is not in #/$defs of this schema")
        if pointer in self._open:
            return self._refuse(f"{at}/$ref", f"{pointer!r} holds itself; columns have an end")
        self._open.append(pointer)
        kind = self._kind(self._root[match[1]][name], pointer)
        self._open.pop()
        return _with(kind, about=_about(schema) or kind.about)

    def _allow(self, schema: Mapping[str, Any], at: str, keywords: set[str], where: str) -> None:
        for keyword in schema:
            if keyword not in keywords and not _is_annotation(keyword):
                known = ", ".join(sorted(keywords - {"type"})) or "none but type"
                self._refuse(
                    f"{at}/{_escape(keyword)}", f"not usable; the keywords {where} are {known}"
                )


def _with(kind: Kind, **changes: Any) -> Kind:
    return type(kind)(**{**vars(kind), **changes})


def _bounds(schema: Mapping[str, Any]) -> dict[str, int | Decimal]:
    return {name: schema[name] for name in _BOUNDS if name in schema}


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _about(schema: Mapping[str, Any]) -> str:
    return " ".join(str(schema.get("description") or schema.get("title") or "").split())


def _unclear(pattern: str) -> str | None:
    """What is a character of a class in JSON Schema, and more in llguidance, as in [[:alpha:]] and
    [a-z--b]: an answer held to the one breaks the other."""
    match = _UNCLEAR.search(_ESCAPED.sub("x", pattern))
    return match and match[1]


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") in ("null", ["null"])


def _is_annotation(keyword: str) -> bool:
    return keyword in _ANNOTATIONS or keyword.startswith("x-")


def _escape(name: str) -> str:
    """As a JSON pointer has it."""
    return name.replace("~", "~0").replace("/", "~1")
