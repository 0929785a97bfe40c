"""Random JSON Schemas of the subset that `vl01 extract` takes, and random values that follow them.

A seed gives the same schema and value for ever: a failure is found again by its number.
"""

import random
import string
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

Schema = dict[str, Any]

_NAMES = ["total", "date", "number", "lines", "price", "name", "city", "vat", "Größe", "金額"]
_CHARACTERS = string.ascii_letters + string.digits + ' .,-/"\\\n\té中🙂'


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """An object with up to five fields, nested at most `depth` deep; sometimes with $defs."""
    schema = _object(rng, depth)
    if rng.random() < 0.3:
        schema["$defs"] = {"shared": _value(rng, depth - 1)}
        schema["properties"]["shared"] = {"$ref": "#/$defs/shared"}
    return schema


def random_value(schema: Schema, rng: random.Random) -> Any:
    """A JSON value that follows the schema; its numbers with decimals are of class Decimal."""
    return _instance(schema, rng, schema.get("$defs", {}))


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 5))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> Schema:
    kinds = [_text, _text, _choice, _date, _number, _number, _boolean]
    if depth > 0:
        kinds += [_object_below(depth), _array_below(depth)] * 2
    schema = rng.choice(kinds)(rng)
    if rng.random() < 0.3:
        schema["description"] = f"the {rng.choice(_NAMES)} as printed"
    return _or_null(schema, rng) if rng.random() < 0.3 else schema


def _or_null(schema: Schema, rng: random.Random) -> Schema:
    if "type" in schema and "enum" not in schema and rng.random() < 0.5:
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _object_below(depth: int):
    return lambda rng: _object(rng, depth)


def _array_below(depth: int):
    def array(rng: random.Random) -> Schema:
        schema = {"type": "array", "items": _value(rng, depth - 1)}
        return schema | _some(rng, minItems=rng.randint(0, 2), maxItems=rng.randint(2, 4))

    return array


def _text(rng: random.Random) -> Schema:
    if rng.random() < 0.3:
        pattern = rng.choice(["^[A-Z]{2}[0-9]{2,4}$", "^[a-z]*$", "[0-9]", "^(x|yy)?z$"])
        return {"type": "string", "pattern": pattern}
    limits = _some(rng, minLength=rng.randint(0, 3), maxLength=rng.randint(3, 12))
    return {"type": "string", **limits}


def _choice(rng: random.Random) -> Schema:
    values = rng.choice([["EUR", "USD", 'a "b"\n'], [1, 2, -30], [True], ["only"]])
    if rng.random() < 0.3:
        return {"const": values[0]}
    return {"enum": values}


def _date(rng: random.Random) -> Schema:
    return {"type": "string", "format": "date"}


def _boolean(rng: random.Random) -> Schema:
    return {"type": "boolean"}


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    bounds = {
        rng.choice(["minimum", "exclusiveMinimum"]): low,
        rng.choice(["maximum", "exclusiveMaximum"]): low + rng.randint(2, 5000),
    }
    kept = {name: bound for name, bound in bounds.items() if rng.random() < 0.5}
    kind = rng.choice([{"type": "integer"}, {"type": "number"}, {"multipleOf": 0.01}])
    return {"type": "number", **kind, **kept}


def _some(rng: random.Random, **keywords: Any) -> Schema:
    return {name: value for name, value in keywords.items() if rng.random() < 0.5}


def _instance(schema: Schema, rng: random.Random, shared: Schema) -> Any:
    if "$ref" in schema:
        return _instance(shared["shared"], rng, shared)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return _instance(rng.choice(schema["anyOf"]), rng, shared)
    type_ = rng.choice(schema["type"]) if isinstance(schema["type"], list) else schema["type"]
    if type_ in ("object", "array"):
        return _container(schema, type_, rng, shared)
    makers = {
        "null": lambda: None,
        "boolean": lambda: rng.random() < 0.5,
        "string": lambda: _string(schema, rng),
        "integer": lambda: _in_bounds(schema, rng, 0),
        "number": lambda: _in_bounds(schema, rng, 2),
    }
    return makers[type_]()


def _container(schema: Schema, type_: str, rng: random.Random, shared: Schema) -> Any:
    if type_ == "array":
        least = schema.get("minItems", 0)
        count = rng.randint(least, schema.get("maxItems", least + 3))
        return [_instance(schema["items"], rng, shared) for _ in range(count)]
    return {
        name: _instance(field, rng, shared)
        for name, field in schema["properties"].items()
        if name in schema["required"] or rng.random() < 0.5
    }


def _string(schema: Schema, rng: random.Random) -> str:
    if schema.get("format") == "date":
        return str(date(1900, 1, 1) + timedelta(days=rng.randrange(80_000)))
    if "pattern" in schema:
        fitting = {"^[A-Z]{2}[0-9]{2,4}$": "DE123", "^[a-z]*$": "abc", "[0-9]": "no 7 é"}
        return fitting.get(schema["pattern"], "yyz")
    least = schema.get("minLength", 0)
    count = rng.randint(least, schema.get("maxLength", least + 20))
    return "".join(rng.choice(_CHARACTERS) for _ in range(count))


def _in_bounds(schema: Schema, rng: random.Random, decimals: int) -> int | Decimal:
    low = schema.get("exclusiveMinimum", schema.get("minimum", -9000) - 1) + 1
    high = schema.get("exclusiveMaximum", schema.get("maximum", low + 9000) + 1) - 1
    whole = rng.randint(low, max(low, high))
    if not decimals or whole == max(low, high):
        return whole
    return Decimal(whole) + Decimal(rng.randrange(100)).scaleb(-decimals)
