"""What a page says, in the three ways a job may ask for it. Knows nothing of how it looks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from model.nano.pages.marked import Marked, join, marked
from model.nano.pages.words import MONTHS, Date, Money

# A value of a field: text, a number or a date as JSON writes it; null; or a list of line items.
Fact = Marked | None | Sequence["Fact"] | Mapping[str, "Fact"]


@dataclass(frozen=True)
class Content:
    """The truth about a page.

    facts: the fields of a receipt or an invoice under the names of the shipped schemas. Empty for
    other kinds of page.
    """

    kind: str
    markdown: Marked
    description: Marked
    facts: Mapping[str, Fact] = field(default_factory=dict)


def iso(shown: Marked, date: Date) -> Marked:
    """The date as YYYY-MM-DD; digits that the page shows keep their places."""
    text, places = shown.text, shown.glyphs
    year = text.index(str(date.year))
    rest = text[:year] + "    " + text[year + 4 :]
    month_name = next((m[:3] for m in MONTHS if m[:3] in rest), None)
    if date.shown.startswith(str(date.year)):
        month, day = 5, 8
    elif month_name:
        month, day = rest.index(month_name), rest.index(str(date.day))
    else:
        day, month = 0, 3

    def number(at: int, value: int, is_shown: bool) -> Marked:
        two = f"{value:02}"
        if not is_shown:
            return Marked(two, (places[at], places[at]))
        width = 2 if text[at : at + 2] == two else 1
        return Marked(two, (places[at], places[at + width - 1]))

    return join(
        "-",
        [
            shown[year : year + 4],
            number(month, date.month, month_name is None),
            number(day, date.day, True),
        ],
    )


def amount(shown: Marked, money: Money) -> Marked:
    """The number inside an amount, with a point before the cents: 1.234,50 € as 1234.50."""
    digits = shown.only("0123456789,." if not money.comma else "0123456789.,")
    cents, whole = digits[len(digits) - 2 :], digits[: len(digits) - 3].only("0123456789")
    point = Marked(".", (digits.glyphs[-3],))
    return whole + point + cents


def currency(shown: Marked, money: Money) -> Marked:
    """EUR for €: the first letter has the place of the sign."""
    if money.sign not in shown.text:
        return marked(money.code)
    at = shown.text.index(money.sign)
    places = shown.glyphs[at : at + len(money.sign)]
    return Marked(money.code, places if len(places) == 3 else places * 3)


def table(head: list[Marked], rows: list[list[Marked]]) -> Marked:
    """A Markdown table."""
    lines = [_row(head), marked("|" + "---|" * len(head)), *map(_row, rows)]
    return join("\n", lines)


def _row(cells: list[Marked]) -> Marked:
    return "| " + join(" | ", cells) + " |"
