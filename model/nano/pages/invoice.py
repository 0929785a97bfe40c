"""Invoices: their print, their text and their fields."""

from model.nano.pages.content import Content, Fact, amount, currency, iso, table
from model.nano.pages.marked import Marked, join
from model.nano.pages.sheet import Sheet
from model.nano.pages.trade import label_value, sum_shown
from model.nano.pages.words import Money, Words


def invoice(sheet: Sheet, words: Words) -> Content:
    """A sheet: seller, buyer, number and dates, a table of items, totals."""
    money = words.money()
    title_first = words.chance(0.4)
    title_text = words.random.choice(("Invoice", "INVOICE", "Invoice", "Tax invoice", "Bill"))
    title = None
    if title_first:
        title = sheet.line(title_text, bold=True, scale=1.4)
        sheet.skip(0.3)
    seller, seller_facts = _party(
        sheet, words, words.company(), bold=words.chance(0.5), taxed=words.chance(0.3)
    )
    sheet.skip(0.5)
    if title is None:
        title = sheet.line(title_text, bold=True, scale=1.4)
        sheet.skip(0.3)
    label = words.random.choice(("Bill to:", "To:", "Customer:", ""))
    to = [sheet.line(label)] if label else []
    buyer, buyer_facts = _party(
        sheet, words, words.company() if words.chance(0.5) else words.person()
    )
    sheet.skip(0.5)
    meta, facts = _invoice_meta(sheet, words)
    sheet.skip(0.5)
    items, item_facts, cents = _invoice_items(sheet, words, money)
    sheet.skip(0.3)
    tail, totals = _invoice_totals(sheet, words, money, cents)
    first = ["# " + title, join("\n", seller)] if title_first else [
        join("\n", seller), "# " + title]  # fmt: skip
    blocks = [*first, join("\n", to + buyer), join("\n", meta), items, join("\n", tail)]
    facts |= {"seller": seller_facts, "buyer": buyer_facts, **totals, "lines": item_facts}
    facts["iban"] = None
    if sheet.room() >= 2 and words.chance(0.4):
        sheet.skip(0.5)
        label = words.random.choice(("IBAN", "IBAN:", "Account:", "Pay to"))
        line, facts["iban"] = label_value(sheet, label, words.iban(), apart=False)
        blocks.append(line)
    return Content(
        "invoice",
        join("\n\n", blocks),
        "An invoice from " + seller[0] + " to " + buyer[0] + " for " + sum_shown(totals) + ".",
        facts,
    )


def _party(
    sheet: Sheet, words: Words, name: str, *, bold: bool = False, taxed: bool = False
) -> tuple[list[Marked], Fact]:
    """Lines of name and address, and perhaps a tax number."""
    lines = [sheet.line(name, bold=bold)]
    address = [sheet.line(make()) for make in (words.street, words.city) if words.chance(0.8)]
    facts: dict[str, Fact] = {
        "name": lines[0],
        "address": join(", ", address) if address else None,
        "tax_number": None,
    }
    lines += address
    if taxed:
        label = words.random.choice(("VAT No.", "Tax ID", "VAT:", "Tax number"))
        line, facts["tax_number"] = label_value(sheet, label, words.tax_number(), apart=False)
        lines.append(line)
    return lines, facts


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
    if words.chance(0.3):
        label = pick(("Order:", "Order No.", "Your reference:", "PO"))
        entries.append(("order_number", label, words.code()))
    if words.chance(0.25):
        words.random.shuffle(entries)
    dates = {"invoice_date": date, "due_date": due}
    lines: list[Marked] = []
    facts: dict[str, Fact] = {"due_date": None, "order_number": None}
    for name, label, value in entries:
        line, shown = label_value(sheet, label, value, apart)
        lines.append(line)
        facts[name] = iso(shown, dates[name]) if name in dates else shown
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
    for _ in range(words.random.randint(1, max(1, min(5, sheet.room(keep=4))))):
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
) -> tuple[list[Marked], dict[str, Fact]]:
    left = sheet.left if words.chance(0.3) else sheet.left + (sheet.right - sheet.left) * 0.4
    rate = words.random.choice((0, 7, 19, 20, 25))
    tax = net * rate // 100
    lines: list[Marked] = []
    facts: dict[str, Fact] = {"subtotal": None, "tax": None}
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
