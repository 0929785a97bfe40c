"""Letters, forms, tables and plain text: their print and their Markdown."""

from model.nano.pages.content import Content, table
from model.nano.pages.marked import Marked, join
from model.nano.pages.sheet import Sheet
from model.nano.pages.words import Words


def letter(sheet: Sheet, words: Words) -> Content:
    """Sender, date, recipient, subject, greeting, paragraphs, sender again."""
    name = words.person() if words.chance(0.5) else words.company()
    right = sheet.left + (sheet.right - sheet.left) * (0.45 if words.chance(0.4) else 0)
    sender = [sheet.line(name, left=right)]
    for make in (words.street, words.city, words.email):
        if words.chance(0.5):
            sender.append(sheet.line(make(), left=right))
    sheet.skip(0.5)
    date = sheet.line(words.date().shown, align=words.random.choice(("left", "right")))
    sheet.skip(0.3)
    recipient_name = words.person()
    recipient = [sheet.line(recipient_name)]
    if words.chance(0.6):
        recipient.append(sheet.line(words.street()))
    sheet.skip(0.5)
    blocks = [join("\n", sender), date, join("\n", recipient)]
    if words.chance(0.6):
        blocks.append("# " + sheet.line(words.title(), bold=True))
        sheet.skip(0.3)
    blocks.append(sheet.line(f"Dear {recipient_name.split(' ')[-1]},"))
    sheet.skip(0.3)
    blocks += paragraphs(sheet, words, keep=3, most=3)
    blocks.append(sheet.line(words.random.choice(("Yours sincerely,", "Kind regards,", "Yours,"))))
    blocks.append(sheet.line(name))
    description = "A letter from " + sender[0] + " to " + recipient[0] + "."
    return Content("letter", join("\n\n", blocks), description)


def paragraphs(sheet: Sheet, words: Words, keep: float, most: int) -> list[Marked]:
    """1 to `most` paragraphs, leaving `keep` lines free where they can."""
    set_paragraphs = []
    for _ in range(words.random.randint(1, most)):
        room = sheet.room(keep)
        if room < 2 and set_paragraphs:
            break
        lines = words.random.randint(1, max(1, min(room, 6)))
        text = " ".join(words.sentence() for _ in range(1 + lines))
        set_paragraphs.append(sheet.wrap(text, lines=lines))
        sheet.skip(0.5)
    return set_paragraphs


def plain(sheet: Sheet, words: Words) -> Content:
    """A heading, paragraphs, perhaps a second heading or a list."""
    title = sheet.line(words.title(), bold=True, scale=words.random.choice((1.2, 1.4, 1.6)))
    sheet.skip(0.4)
    blocks = ["# " + title, *paragraphs(sheet, words, keep=4, most=3)]
    if sheet.room() >= 4 and words.chance(0.5):
        blocks.append(_bullets(sheet, words))
        sheet.skip(0.4)
    if sheet.room() >= 4 and words.chance(0.5):
        blocks.append("## " + sheet.line(words.title(), bold=True))
        sheet.skip(0.3)
        blocks += paragraphs(sheet, words, keep=1, most=2)
    return Content("text", join("\n\n", blocks), "A page of text titled " + title + ".")


def _bullets(sheet: Sheet, words: Words) -> Marked:
    sign, items = words.random.choice("-•*"), []
    for _ in range(words.random.randint(2, max(2, min(5, sheet.room())))):
        line = sheet.line(
            f"{sign} {' '.join(words.word() for _ in range(words.random.randint(1, 5)))}"
        )
        items.append("- " + line[2:])
    return join("\n", items)


def form(sheet: Sheet, words: Words) -> Content:
    """A title, labels with values on lines or in boxes, ticks."""
    title = sheet.line(words.title(), bold=True, scale=1.3)
    organisation = sheet.line(words.company())
    sheet.skip(0.5)
    values = {
        "Name": words.person, "First name": words.name, "Street": words.street,
        "City": words.city, "Phone": words.phone, "Email": words.email, "Reference": words.code,
        "Date": lambda: words.date().shown, "Date of birth": lambda: words.date().shown,
        "Company": words.company, "Subject": words.title, "Account": words.code,
        "Age": lambda: str(words.random.randint(18, 99)),
    }  # fmt: skip
    labels = words.random.sample(
        list(values), max(1, min(sheet.room(3), words.random.randint(3, 9)))
    )
    split = sheet.left + (sheet.right - sheet.left) * words.random.choice((0.38, 0.45))
    boxed = words.chance(0.4)
    lines = []
    for label in labels:
        name = sheet.put(label + ":", right=split)
        top = sheet.y
        value = sheet.put(values[label](), left=split + 4, right=sheet.right - 4)
        sheet.skip(1)
        if boxed:
            sheet.box(split, top, sheet.right, sheet.y - 1)
        lines.append(name + " " + value)
        sheet.skip(0.15)
    sheet.skip(0.4)
    ticks = []
    for _ in range(words.random.randint(0, max(0, min(3, sheet.room())))):
        mark = words.random.choice(("[x]", "[ ]"))
        ticks.append(sheet.line(f"{mark} {words.title()}"))
    blocks = ["# " + title, organisation, join("\n", lines)] + [join("\n", ticks)] * bool(ticks)
    description = "A form titled " + title + " from " + organisation + "."
    return Content("form", join("\n\n", blocks), description)


def grid(sheet: Sheet, words: Words) -> Content:
    """A title and a table of words and numbers, with or without lines."""
    title = sheet.line(words.title(), bold=True, scale=1.3)
    sheet.skip(0.5)
    columns = words.random.randint(2, max(2, min(5, (sheet.right - sheet.left) // 100)))
    edges = [
        sheet.left + round((sheet.right - sheet.left) * i / columns) for i in range(columns + 1)
    ]
    numeric = [False] + [words.chance(0.7) for _ in range(columns - 1)]
    ruled, top = words.chance(0.5), sheet.y
    rows = []
    for row in range(words.random.randint(3, max(3, min(9, sheet.room(1))))):
        if ruled:
            _line_above(sheet)
        rows.append(_cells(sheet, words, edges, numeric, head=row == 0))
    if ruled:
        _line_above(sheet)
        for x in edges:
            sheet.upright(x, top, sheet.y)
    description = "A table titled " + title + "."
    return Content("table", "# " + title + "\n\n" + table(rows[0], rows[1:]), description)


def _line_above(sheet: Sheet) -> None:
    sheet.box(sheet.left, sheet.y, sheet.right, sheet.y)


def _cells(
    sheet: Sheet, words: Words, edges: list[int], numeric: list[bool], head: bool
) -> list[Marked]:
    cells = []
    for i, is_number in enumerate(numeric):
        if head:
            text = words.name()
        elif is_number:
            text = words.random.choice((f"{words.cents(90000) / 100:.2f}", str(words.cents(9999))))
        else:
            text = words.word() if words.chance(0.5) else words.goods()
        align = "right" if is_number else "left"
        cells.append(
            sheet.put(text, left=edges[i] + 4, right=edges[i + 1] - 4, align=align, bold=head)
        )
    sheet.skip(1)
    return cells
