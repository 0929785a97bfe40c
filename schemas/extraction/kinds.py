"""The kinds of value a schema is made of: each knows its Arrow type, which JSON values it takes,
what the engine may write for it, and how to say so in a prompt. Knows no JSON Schema keyword that
it does not write itself.

While decoding, more is asked than a kind takes: what is unbounded gets a bound, so that no value
goes on for ever, and a date is one of the calendar.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

import pyarrow as pa

from schemas.errors import Reason, RowError

MOST_CHARACTERS = 1000  # written for a string without maxLength
MOST_ITEMS = 100  # written for an array without maxItems

Span = tuple[int, int]  # where a value stands in the text: first character, and one after its last
Least = Callable[[Span], float | None]  # the least probability among the tokens of a span

_LONGEST_SHOWN = 60
_END_MARK = re.compile(r"(\\.|\[\^?\]?(?:\\.|[^\]\\])*\])|\$")  # but for one escaped or in a class


def mismatch(message: str) -> RowError:
    """Whatever the answer holds, the message can be stored."""
    return RowError(Reason.SCHEMA_MISMATCH, message.encode(errors="replace").decode())


@dataclass(frozen=True, kw_only=True)
class Kind(ABC):
    """A value, or null where `null` says so. about: its description, for the prompt."""

    about: str = ""
    null: bool = False

    @property
    @abstractmethod
    def arrow(self) -> pa.DataType: ...

    @property
    def confidence_type(self) -> pa.DataType:
        return pa.float32()

    @property
    @abstractmethod
    def words(self) -> str:
        """What it is, in a few words."""

    def constraint(self) -> dict[str, Any]:
        """The JSON Schema of what the engine may write: never more than `value` takes."""
        return (
            {"anyOf": [self._constraint(), {"type": "null"}]} if self.null else self._constraint()
        )

    def constraint_text(self) -> str:
        """`constraint` as JSON without whitespace."""
        return json.dumps(
            self.constraint(), separators=(",", ":"), ensure_ascii=False, default=float
        )

    def value(self, found: Any, where: str) -> Any:
        """What Arrow stores of a JSON value (numbers: int or Decimal). where: for the message of
        the RowError that it raises if this kind does not take it."""
        return None if found is None and self.null else self._value(found, where)

    def confidence(self, place: Any, least: Least) -> Any:
        """Of the value at `place`, a Span or a dict or list of them, in `confidence_type`."""
        return least(place) if isinstance(place, tuple) else None

    @abstractmethod
    def _constraint(self) -> dict[str, Any]: ...

    @abstractmethod
    def _value(self, found: Any, where: str) -> Any: ...

    def _refuse(self, found: Any, where: str, wanted: str = "") -> NoReturn:
        shown = _shown(found)
        if len(shown) > _LONGEST_SHOWN:
            shown = shown[: _LONGEST_SHOWN - 3] + "..."
        raise mismatch(f"{where or 'the answer'} is {shown}; expected {wanted or self.words}")


@dataclass(frozen=True, kw_only=True)
class Boolean(Kind):
    @property
    def arrow(self) -> pa.DataType:
        return pa.bool_()

    @property
    def words(self) -> str:
        return "true or false"

    def _constraint(self) -> dict[str, Any]:
        return {"type": "boolean"}

    def _value(self, found: Any, where: str) -> bool:
        return found if isinstance(found, bool) else self._refuse(found, where)


@dataclass(frozen=True, kw_only=True)
class Choice(Kind):
    """One of some strings, integers or booleans; all of one type."""

    choices: tuple[Any, ...]

    @property
    def arrow(self) -> pa.DataType:
        return {str: pa.string(), int: pa.int64(), bool: pa.bool_()}[type(self.choices[0])]

    @property
    def words(self) -> str:
        return "one of " + ", ".join(map(_shown, self.choices))

    def _constraint(self) -> dict[str, Any]:
        return {"enum": list(self.choices)}

    def _value(self, found: Any, where: str) -> Any:
        same = type(found) is type(self.choices[0]) and found in self.choices
        return found if same else self._refuse(found, where)


@dataclass(frozen=True, kw_only=True)
class Text(Kind):
    """Lengths in characters. pattern: is searched for, as JSON Schema says."""

    min_length: int = 0
    max_length: int | None = None
    pattern: str | None = None

    @property
    def arrow(self) -> pa.DataType:
        return pa.string()

    @property
    def words(self) -> str:
        told = [f"at least {self.min_length}"] if self.min_length else []
        told += [] if self.max_length is None else [f"at most {self.max_length}"]
        length = [f"of {' and '.join(told)} characters"] if told else []
        return " ".join(["text", *length, *([f"matching {self.pattern}"] if self.pattern else [])])

    def _constraint(self) -> dict[str, Any]:
        most = max(MOST_CHARACTERS, self.min_length) if self.max_length is None else self.max_length
        found = {"type": "string", "minLength": self.min_length, "maxLength": most}
        return found | ({"pattern": self.pattern} if self.pattern else {})

    def _value(self, found: Any, where: str) -> str:
        if not isinstance(found, str) or len(found) < self.min_length:
            self._refuse(found, where)
        if self.max_length is not None and len(found) > self.max_length:
            self._refuse(found, where)
        if self.pattern and not re.search(_to_the_end(self.pattern), found):
            self._refuse(found, where)
        try:
            found.encode()
        except UnicodeEncodeError:
            self._refuse(found, where, "text; this has half of a surrogate pair")
        return found


@dataclass(frozen=True, kw_only=True)
class Items(Kind):
    """A list; `most` items if that is not None."""

    item: Kind
    least: int = 0
    most: int | None = None

    @property
    def arrow(self) -> pa.DataType:
        return pa.list_(self.item.arrow)

    @property
    def confidence_type(self) -> pa.DataType:
        return pa.list_(self.item.confidence_type)

    @property
    def words(self) -> str:
        return f"list of {self.item.words}" + (" or null" if self.item.null else "")

    def _constraint(self) -> dict[str, Any]:
        most = max(MOST_ITEMS, self.least) if self.most is None else self.most
        items = self.item.constraint()
        return {"type": "array", "items": items, "minItems": self.least, "maxItems": most}

    def _value(self, found: Any, where: str) -> list:
        if not isinstance(found, list):
            self._refuse(found, where, "a list")
        if len(found) < self.least or (self.most is not None and len(found) > self.most):
            most = "any number" if self.most is None else self.most
            raise mismatch(f"{where} has {len(found)} items; expected {self.least} to {most}")
        return [self.item.value(item, f"{where}[{i}]") for i, item in enumerate(found)]

    def confidence(self, place: Any, least: Least) -> Any:
        if not isinstance(place, list):
            return None
        return [self.item.confidence(item, least) for item in place]


@dataclass(frozen=True, kw_only=True)
class Fields(Kind):
    """An object: its fields by name, and which of them must be there. One that is not is null."""

    fields: Mapping[str, Kind]
    required: frozenset[str]

    @property
    def arrow(self) -> pa.StructType:
        return pa.struct([(name, kind.arrow) for name, kind in self.fields.items()])

    @property
    def confidence_type(self) -> pa.DataType:
        return pa.struct([(name, kind.confidence_type) for name, kind in self.fields.items()])

    @property
    def words(self) -> str:
        return "object"

    def _constraint(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {name: kind.constraint() for name, kind in self.fields.items()},
            "required": [name for name in self.fields if name in self.required],
            "additionalProperties": False,
        }

    def _value(self, found: Any, where: str) -> dict[str, Any]:
        if not isinstance(found, dict):
            self._refuse(found, where, "an object")
        if missing := sorted(self.required - found.keys()):
            raise mismatch(f"{where or 'the answer'} lacks {missing[0]!r}")
        if unknown := sorted(found.keys() - self.fields.keys()):
            name = unknown[0][:_LONGEST_SHOWN]
            raise mismatch(f"{where or 'the answer'} has {name!r}, which is not in the schema")
        return {
            name: kind.value(found[name], f"{where}.{name}".lstrip(".")) if name in found else None
            for name, kind in self.fields.items()
        }

    def confidence(self, place: Any, least: Least) -> Any:
        if not isinstance(place, dict):
            return None
        return {
            name: kind.confidence(place[name], least) if name in place else None
            for name, kind in self.fields.items()
        }


def _to_the_end(pattern: str) -> str:
    """For Python, whose `$` also stands before a newline at the end."""
    return _END_MARK.sub(lambda match: match[1] or r"\Z", pattern)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Decimal) else json.dumps(value, default=str)
