"""Numbers: int64, double, and decimals that are never rounded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any

import pyarrow as pa

from schemas.extraction.kinds import Kind

DIGITS = 15  # before the point: a double holds that many exactly
MOST_DECIMALS = 9  # that multipleOf may ask for
WRITTEN_DECIMALS = 6  # for a number without multipleOf

INT64 = 2**63
_WRITTEN_INTEGER = 10**18 - 1
_WRITTEN = 10**DIGITS - 1
_EXACT = Context(prec=DIGITS + MOST_DECIMALS)


@dataclass(frozen=True, kw_only=True)
class _Numeric(Kind):
    """bounds: by JSON Schema's keyword, such as exclusiveMinimum."""

    bounds: Mapping[str, int | Decimal]

    def _bounded(self, words: str) -> str:
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        told = [f"{signs[name]} {value}" for name, value in self.bounds.items()]
        return " ".join([words, *([" and ".join(told)] if told else [])])

    def _written(self, most: int) -> dict[str, int | float]:
        """The bounds, and `most` on the sides that have none."""
        found = {name: _plain(value) for name, value in self.bounds.items()}
        if not found.keys() & {"minimum", "exclusiveMinimum"}:
            found["minimum"] = -most
        if not found.keys() & {"maximum", "exclusiveMaximum"}:
            found["maximum"] = most
        return found

    def _number(self, found: Any, where: str) -> int | Decimal:
        """A number within the bounds."""
        if isinstance(found, bool) or not isinstance(found, int | Decimal):
            self._refuse(found, where)
        for name, bound in self.bounds.items():
            beyond = found < bound if "inimum" in name else found > bound
            if beyond or (name.startswith("exclusive") and found == bound):
                self._refuse(found, where)
        return found


@dataclass(frozen=True, kw_only=True)
class Integer(_Numeric):
    @property
    def arrow(self) -> pa.DataType:
        return pa.int64()

    @property
    def words(self) -> str:
        return self._bounded("integer")

    def _constraint(self) -> dict[str, Any]:
        return {"type": "integer", **self._written(_WRITTEN_INTEGER)}

    def _value(self, found: Any, where: str) -> int:
        number = self._number(found, where)
        if not -INT64 <= number < INT64:  # asked first: int(Decimal("1e999999999")) takes hours
            self._refuse(found, where, "an integer of 64 bits")
        return int(number) if number == int(number) else self._refuse(found, where)


@dataclass(frozen=True, kw_only=True)
class Number(_Numeric):
    @property
    def arrow(self) -> pa.DataType:
        return pa.float64()

    @property
    def words(self) -> str:
        return self._bounded("number")

    def _constraint(self) -> dict[str, Any]:
        step = float(Decimal(1).scaleb(-WRITTEN_DECIMALS))
        return {"type": "number", "multipleOf": step, **self._written(_WRITTEN)}

    def _value(self, found: Any, where: str) -> float:
        number = float(self._number(found, where))
        return number if math.isfinite(number) else self._refuse(found, where, "a finite number")


@dataclass(frozen=True, kw_only=True)
class Fixed(_Numeric):
    """A number with so many decimals and no rounding: what money is."""

    decimals: int

    @property
    def arrow(self) -> pa.DataType:
        return pa.decimal128(DIGITS + self.decimals, self.decimals)

    @property
    def words(self) -> str:
        return self._bounded(f"number with at most {self.decimals} decimals")

    def _constraint(self) -> dict[str, Any]:
        step = float(self._step)
        return {"type": "number", "multipleOf": step, **self._written(_WRITTEN)}

    def _value(self, found: Any, where: str) -> Decimal:
        number = Decimal(self._number(found, where))
        if not -(10**DIGITS) < number < 10**DIGITS:
            self._refuse(found, where, f"at most {DIGITS} digits before the point")
        exact = number.quantize(self._step, context=_EXACT)
        return exact if exact == number else self._refuse(found, where)

    @property
    def _step(self) -> Decimal:
        return Decimal(1).scaleb(-self.decimals)


def _plain(value: int | Decimal) -> int | float:
    return value if isinstance(value, int) else float(value)
