"""JSON as a standard has it and Python's reader does not: no NaN, no name twice, exact numbers."""

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

_LONGEST_INTEGER = 50  # characters: Python refuses one of 5,000, and none so long is wanted
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_json(text: str) -> Any:
    """The value of a JSON text; numbers are int or Decimal. Raises ValueError."""
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_decimal,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def places(text: str) -> Any:
    """Where each value of a JSON text stands: dicts and lists as in the text, and for each value
    in them (first character, one after its last). The text must be one that `read_json` takes."""
    return _places(text, _skip(text, 0))[0]


def _places(text: str, at: int) -> tuple[Any, int]:
    """And where it ends."""
    if text[at] == "{":
        fields = {}
        at = _skip(text, at + 1)
        while text[at] != "}":
            name, at = _DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # the colon
            fields[name], at = _places(text, at)
            at = _next(text, at)
        return fields, at + 1
    if text[at] == "[":
        items = []
        at = _skip(text, at + 1)
        while text[at] != "]":
            item, at = _places(text, at)
            items.append(item)
            at = _next(text, at)
        return items, at + 1
    _, end = _DECODER.raw_decode(text, at)
    return (at, end), end


def _next(text: str, at: int) -> int:
    """Past a comma, if one is there."""
    at = _skip(text, at)
    return _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < _LONGEST_INTEGER else Decimal(digits)


def _decimal(digits: str) -> Decimal:
    try:
        return Decimal(digits)
    except InvalidOperation:
        raise ValueError("a number beyond all bounds") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
