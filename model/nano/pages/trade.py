"""What receipts and invoices have in common."""

from model.nano.pages.content import Fact
from model.nano.pages.marked import Marked
from model.nano.pages.sheet import Sheet


def sum_shown(facts: dict[str, Fact]) -> Marked:
    """12.40 EUR"""
    total, code = facts["total"], facts["currency"]
    assert isinstance(total, Marked)
    assert isinstance(code, Marked)
    return total + " " + code


def label_value(sheet: Sheet, label: str, value: str, apart: bool) -> tuple[Marked, Marked]:
    """The line as Markdown, and the value in it."""
    if not label:
        shown = sheet.line(value, whole=True)
        return shown, shown
    if apart:
        name = sheet.put(label, right=sheet.left + (sheet.right - sheet.left) * 0.4)
        value_left = sheet.left + (sheet.right - sheet.left) * 0.42
        shown = sheet.line(value, align="right", left=value_left, whole=True)
        return name + " " + shown, shown
    line = sheet.line(f"{label} {value}", whole=True)
    return line, line[len(label) + 1 :]
