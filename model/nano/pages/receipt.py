"""Receipts: their print, their text and their fields."""

from model.nano.pages.content import Content, Fact, amount, currency, iso
from model.nano.pages.marked import Marked, join
from model.nano.pages.sheet import Align, Sheet
from model.nano.pages.trade import label_value, sum_shown
from model.nano.pages.words import Date, Money, Words


def receipt(sheet: Sheet, words: Words) -> Content:
    """Narrow: shop, items with prices at the right, total."""
    align: Align = words.random.choice(("left", "center", "center"))
    money, date = words.money(), words.date()
    shop = sheet.line(words.company(), align=align, bold=words.chance(0.6), scale=1.2)
    address = [
        sheet.line(make(), align=align) for make in (words.street, words.city) if words.chance(0.5)
    ]
    head = list(address)
    if words.chance(0.3):
        head.append(sheet.line(words.phone(), align=align))
    _divide(sheet, words)
    meta, facts = _receipt_meta(sheet, words, date)
    _divide(sheet, words)
    lines, items, sum_cents = _receipt_items(sheet, words, money)
    _divide(sheet, words)
    tail, totals = _receipt_total(sheet, words, money, sum_cents)
    facts |= {"merchant": shop, **totals, "items": items, "tip": None}
    facts["address"] = join(", ", address) if address else None
    if sheet.room() > 1 and words.chance(0.5):
        sheet.skip(0.4)
        thanks = words.random.choice(("Thank you!", "Please come again", "Have a nice day"))
        tail.append(sheet.line(thanks, align=align))
    blocks = ["# " + shop, *filter(len, (join("\n", part) for part in (head, meta, lines, tail)))]
    return Content(
        "receipt",
        join("\n\n", blocks),
        "A receipt from " + shop + " for " + sum_shown(totals) + ".",
        facts,
    )


def _divide(sheet: Sheet, words: Words) -> None:
    if words.chance(0.5):
        sheet.rule()
    else:
        sheet.skip(0.5)


def _receipt_meta(sheet: Sheet, words: Words, date: Date) -> tuple[list[Marked], dict[str, Fact]]:
    label = words.random.choice(("Receipt", "Receipt No.", "Bon", "No.", "Ticket"))
    number = words.code()
    day = date.shown
    time = words.time() if words.chance(0.5) else ""
    day_label = words.random.choice(("Date", "", "Date:"))
    entries = [("number", label, number), ("date", day_label, f"{day} {time}".strip())]
    if words.chance(0.4):
        entries.reverse()
    lines = []
    facts: dict[str, Fact] = {"time": None}
    for name, text, value in entries:
        line, shown = label_value(sheet, text, value, words.chance(0.3))
        lines.append(line)
        if name == "date":
            facts["date"] = iso(shown[: len(day)], date)
            facts["time"] = shown[len(day) + 1 :] if time else None
    return lines, facts


def _receipt_items(
    sheet: Sheet, words: Words, money: Money
) -> tuple[list[Marked], list[dict[str, Fact]], int]:
    most = max(1, min(9, sheet.room(keep=5)))
    lines: list[Marked] = []
    items: list[dict[str, Fact]] = []
    total = 0
    price_left = sheet.right - sheet.font().getlength("1,234.56 ")
    counted = words.chance(0.5)
    for _ in range(words.random.randint(1, most)):
        count = words.random.randint(1, 9) if counted else 1
        cents = count * words.cents(9000)
        total += cents
        text = f"{count} x {words.goods()}" if counted else words.goods()
        name = sheet.put(text, right=price_left)
        price = sheet.line(money.digits(cents), align="right", left=price_left, whole=True)
        lines.append(name + " " + price)
        start = len(f"{count} x ") if counted else 0
        items.append(
            {
                "name": name[start:],
                "quantity": name[:1] if counted else None,
                "amount": amount(price, money),
            }
        )
    return lines, items, total


def _receipt_total(
    sheet: Sheet, words: Words, money: Money, cents: int
) -> tuple[list[Marked], dict[str, Fact]]:
    bold, scale = words.chance(0.6), words.random.choice((1, 1, 1.15))
    label = words.random.choice(("Total", "TOTAL", "Sum", "Amount due", "To pay"))
    name = sheet.put(label, bold=bold, scale=scale)
    left = sheet.left + sheet.font(bold, scale).getlength(label + "  ")
    shown = sheet.line(
        money.full(cents), align="right", bold=bold, scale=scale, left=left, whole=True
    )
    lines = [name + " " + shown]
    facts: dict[str, Fact] = {"currency": currency(shown, money), "total": amount(shown, money)}
    facts |= {"tax": None, "payment": None}
    if sheet.room() > 2 and words.chance(0.3):
        tax = sheet.put(words.random.choice(("VAT", "Tax", "incl. VAT")))
        digits = money.digits(cents // words.random.choice((5, 6, 10)))
        value = sheet.line(digits, align="right", left=left + 20, whole=True)
        lines.append(tax + " " + value)
        facts["tax"] = amount(value, money)
    if sheet.room() > 2 and words.chance(0.5):
        paid, means = words.random.choice(
            (("Cash", "cash"), ("Card", "card"), ("Visa", "card"), ("Voucher", "other"))
        )
        name = sheet.put(paid)
        lines.append(
            name + " " + sheet.line(money.digits(cents), align="right", left=left + 20, whole=True)
        )
        facts["payment"] = Marked(means, (name.glyphs[0],) * len(means))
    return lines, facts
