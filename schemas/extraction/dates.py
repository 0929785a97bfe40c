"""Dates and moments, which exist in the calendar."""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa

from schemas.extraction.kinds import Kind

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DATE_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})"
)


@dataclass(frozen=True, kw_only=True)
class Date(Kind):
    @property
    def arrow(self) -> pa.DataType:
        return pa.date32()

    @property
    def words(self) -> str:
        return "date as YYYY-MM-DD"

    def _constraint(self) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^{_dates(10, 99)}$"}

    def _value(self, found: Any, where: str) -> date:
        if not isinstance(found, str) or not _DATE.fullmatch(found):
            self._refuse(found, where)
        try:
            return date.fromisoformat(found)
        except ValueError:
            return self._refuse(found, where, "a date of the calendar")


@dataclass(frozen=True, kw_only=True)
class Moment(Kind):
    """A date and time with its offset, as in RFC 3339; kept in UTC, in microseconds."""

    @property
    def arrow(self) -> pa.DataType:
        return pa.timestamp("us", "UTC")

    @property
    def words(self) -> str:
        return "date and time as YYYY-MM-DDThh:mm:ssZ"

    def _constraint(self) -> dict[str, Any]:
        # Years to 8999: west of Greenwich, the last evening of 9999 is in the year 10000 of UTC.
        hour, minute = "([01][0-9]|2[0-3])", "[0-5][0-9]"
        time = rf"{hour}:{minute}:{minute}(\.[0-9]{{1,6}})?(Z|[+-]{hour}:{minute})"
        return {"type": "string", "pattern": f"^{_dates(10, 89)}T{time}$"}

    def _value(self, found: Any, where: str) -> datetime:
        if not isinstance(found, str) or not _DATE_TIME.fullmatch(found):
            self._refuse(found, where)
        try:
            return datetime.fromisoformat(found).astimezone(UTC)
        except (ValueError, OverflowError):
            return self._refuse(found, where, "a date and time that exist")


def _dates(first_century: int, last_century: int) -> str:
    """A regular expression of the calendar's dates; centuries are the first digits of a year."""
    centuries = range(first_century, last_century + 1)
    tens = "".join(sorted({str(century // 10) for century in centuries}))
    leap = "|".join(str(century) for century in centuries if century % 4 == 0)
    year = f"[{tens[0]}-{tens[-1]}][0-9]{{3}}"
    fourth = "0[48]|[2468][048]|[13579][26]"
    leap_year = f"([{tens[0]}-{tens[-1]}][0-9]({fourth})|({leap})00)"
    days = (
        "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])",
        "(0[469]|11)-(0[1-9]|[12][0-9]|30)",
        "02-(0[1-9]|1[0-9]|2[0-8])",
    )
    return f"({year}-({'|'.join(days)})|{leap_year}-02-29)"
