"""Receipts and invoices: their print, their text and their fields."""

from model.nano.pages.content import Content, Fact, amount, currency, iso, table
from model.nano.pages.marked import Marked, join
from model.nano.pages.sheet import Align, Sheet
from model.nano.pages.words import Date, Money, Words


def receipt(sheet: Sheet, words: Words) -> Content:
    """Narrow: shop, items with prices at the right, total."""
    align: Align = words.random.choice(("left", "center", "center"))
    money, date = words.money(), words.date()
    shop = sheet.line(words.company(), align=align, bold=words.chance(0.6), scale=1.2)
    head: list[Marked] = []
    for make in (words.street, words.city, words.phone):
        if words.chance(0.5):
            head.append(sheet.line(make(), align=align))
    _divide(sheet, words)
    meta, facts = _receipt_meta(sheet, words, date)
    _divide(sheet, words)
    lines, items, sum_cents = _receipt_items(sheet, words, money)
    _divide(sheet, words)
    tail, totals = _receipt_total(sheet, words, money, sum_cents)
    facts |= {"merchant": shop, **totals, "items": items}
    if sheet.room() > 1 and words.chance(0.5):
        sheet.skip(0.4)
        thanks = words.random.choice(("Thank you!", "Please come again", "Have a nice day"))
        tail.append(sheet.line(thanks, align=align))
    blocks = ["# " + shop, *filter(len, (join("\n", part) for part in (head, meta, lines, tail)))]
    return Content(
        "receipt",
        join("\n\n", blocks),
        "A receipt from " + shop + " for " + totals["total"] + " " + totals["currency"] + ".",
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
    parts = {
        "number": lambda: _label_value(sheet, label, number, words.chance(0.3)),
        "date": lambda: _label_value(
            sheet, words.random.choice(("Date", "", "Date:")), date.shown, words.chance(0.3)
        ),
    }
    order = ["number", "date"] if words.chance(0.6) else ["date", "number"]
    set_lines = {name: parts[name]() for name in order}
    facts: dict[str, Fact] = {
        "receipt_number": set_lines["number"][1],
        "date": iso(set_lines["date"][1], date),
    }
    return [set_lines[name][0] for name in order], facts


def _label_value(sheet: Sheet, label: str, value: str, apart: bool) -> tuple[Marked, Marked]:
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
                "description": name[start:],
                "quantity": name[:1] if counted else None,
                "amount": amount(price, money),
            }
        )
    return lines, items, total


def _receipt_total(
    sheet: Sheet, words: Words, money: Money, cents: int
) -> tuple[list[Marked], dict[str, Marked]]:
    bold, scale = words.chance(0.6), words.random.choice((1, 1, 1.15))
    label = words.random.choice(("Total", "TOTAL", "Sum", "Amount due", "To pay"))
    name = sheet.put(label, bold=bold, scale=scale)
    price_left = sheet.left + sheet.font(bold, scale).getlength(label + "  ")
    shown = sheet.line(
        money.full(cents), align="right", bold=bold, scale=scale, left=price_left, whole=True
    )
    lines = [name + " " + shown]
    if sheet.room() > 2 and words.chance(0.4):
        paid = words.random.choice(("Cash", "Card", "Visa", "Debit"))
        name, digits = sheet.put(paid), money.digits(cents)
        lines.append(name + " " + sheet.line(digits, align="right", left=price_left, whole=True))
    return lines, {"currency": currency(shown, money), "total": amount(shown, money)}


def invoice(sheet: Sheet, words: Words) -> Content:
    """A sheet: seller, buyer, number and dates, a table of items, totals."""
    money = words.money()
    title_first = words.chance(0.4)
    title_text = words.random.choice(("Invoice", "INVOICE", "Invoice", "Tax invoice", "Bill"))
    title = None
    if title_first:
        title = sheet.line(title_text, bold=True, scale=1.4)
        sheet.skip(0.3)
    seller = _address(sheet, words, words.company(), bold=words.chance(0.5))
    sheet.skip(0.5)
    if title is None:
        title = sheet.line(title_text, bold=True, scale=1.4)
        sheet.skip(0.3)
    label = words.random.choice(("Bill to:", "To:", "Customer:", ""))
    to = [sheet.line(label)] if label else []
    buyer = _address(sheet, words, words.company() if words.chance(0.5) else words.person())
    sheet.skip(0.5)
    meta, facts = _invoice_meta(sheet, words)
    sheet.skip(0.5)
    items, item_facts, cents = _invoice_items(sheet, words, money)
    sheet.skip(0.3)
    tail, totals = _invoice_totals(sheet, words, money, cents)
    first = ["# " + title, join("\n", seller)] if title_first else [
        join("\n", seller), "# " + title]  # fmt: skip
    blocks = [*first, join("\n", to + buyer), join("\n", meta), items, join("\n", tail)]
    facts |= {"seller": seller[0], "buyer": buyer[0], **totals, "items": item_facts}
    total = totals["total"] + " " + totals["currency"]
    return Content(
        "invoice",
        join("\n\n", blocks),
        "An invoice from " + seller[0] + " to " + buyer[0] + " for " + total + ".",
        facts,
    )


def _address(sheet: Sheet, words: Words, name: str, bold: bool = False) -> list[Marked]:
    lines = [sheet.line(name, bold=bold)]
    for make in (words.street, words.city):
        if words.chance(0.8):
            lines.append(sheet.line(make()))
    return lines


def _invoice_meta(sheet: Sheet, words: Words) -> tuple[list[Marked], dict[str, Fact]]:
    date, due = words.date(), words.date()
    pick = words.random.choice
    apart = words.chance(0.3)
    entries = [
        (
            "invoice_number",
            pick(("Invoice No.", "Number:", "Invoice number:", "No.")),
            words.code(),
        ),
        ("invoice_date", pick(("Date:", "Invoice date:", "Date")), date.shown),
    ]
    if words.chance(0.5):
        entries.append(("due_date", pick(("Due:", "Due date:", "Pay by:")), due.shown))
    if words.chance(0.25):
        words.random.shuffle(entries)
    lines, facts = [], {"due_date": None}
    for name, label, value in entries:
        line, shown = _label_value(sheet, label, value, apart)
        lines.append(line)
        facts[name] = {
            "invoice_number": lambda s: s,
            "invoice_date": lambda s: iso(s, date),
            "due_date": lambda s: iso(s, due),
        }[name](shown)
    return lines, facts


def _invoice_items(
    sheet: Sheet, words: Words, money: Money
) -> tuple[Marked, list[dict[str, Fact]], int]:
    width = sheet.right - sheet.left
    edges = [sheet.left + round(width * f) for f in (0, 0.48, 0.58, 0.78, 1)]
    heads = [words.random.choice(h) for h in (("Item", "Description", "Article"), ("Qty", "No"),
             ("Price", "Unit"), ("Amount", "Total"))]  # fmt: skip
    head = _cells(sheet, heads, edges, bold=words.chance(0.6))
    if words.chance(0.6):
        sheet.rule()
    rows, items, total = [], [], 0
    for _ in range(words.random.randint(1, max(1, min(6, sheet.room(keep=4))))):
        count, price = words.random.randint(1, 20), words.cents(90000)
        total += count * price
        texts = [words.goods(), str(count), money.digits(price), money.digits(count * price)]
        row = _cells(sheet, texts, edges)
        rows.append(row)
        items.append(
            {
                "description": row[0],
                "quantity": row[1],
                "unit_price": amount(row[2], money),
                "amount": amount(row[3], money),
            }
        )
    if words.chance(0.5):
        sheet.rule()
    return table(head, rows), items, total


def _cells(sheet: Sheet, texts: list[str], edges: list[int], bold: bool = False) -> list[Marked]:
    gap = sheet.style.size * 0.3
    cells = [
        sheet.put(
            text,
            bold=bold,
            left=edges[i] + (gap if i else 0),
            right=edges[i + 1],
            align="right" if i else "left",
            whole=i > 0,
        )
        for i, text in enumerate(texts)
    ]
    sheet.skip(1)
    return cells


def _invoice_totals(
    sheet: Sheet, words: Words, money: Money, net: int
) -> tuple[list[Marked], dict[str, Marked]]:
    left = sheet.left if words.chance(0.3) else sheet.left + (sheet.right - sheet.left) * 0.4
    rate = words.random.choice((0, 7, 19, 20, 25))
    tax = net * rate // 100
    lines, facts = [], {}
    if rate:
        entries = [
            ("subtotal", words.random.choice(("Subtotal", "Net")), money.digits(net)),
            ("tax", words.random.choice((f"VAT {rate}%", f"Tax {rate}%")), money.digits(tax)),
        ]
    else:
        entries = []
    entries.append(
        ("total", words.random.choice(("Total", "Total due", "Amount due")), money.full(net + tax))
    )
    for name, label, value in entries:
        bold = name == "total" and words.chance(0.6)
        shown_label = sheet.put(label, left=left, bold=bold)
        value_left = left + sheet.font(bold).getlength(label + "  ")
        shown = sheet.line(value, left=value_left, align="right", bold=bold, whole=True)
        lines.append(shown_label + " " + shown)
        facts[name] = amount(shown, money)
        if name == "total":
            facts["currency"] = currency(shown, money)
    return lines, facts
