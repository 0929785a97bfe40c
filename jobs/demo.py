"""`make demo`: printed pages through the whole of `vl01`, on CPU, by a small model that reads.

    python -m jobs.demo

Makes demo-output/ anew, then gives commands and reads the datasets back, as a user would; but for
Ray and the libraries, which start once for all of them.
"""

import io
import json
import os
import shutil
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import model.nano
from jobs import cli
from model.nano.pages.page import Page
from model.nano.quality import FONTS, Answered, held_out_pages, png, score
from model.nano.tasks import answers
from pipeline.placement import ray_session

CHECKPOINT = Path(os.path.relpath(Path(model.nano.__path__[0]) / "checkpoint"))
FOLDER = Path("demo-output")
PAGES, ANSWERS = FOLDER / "pages", FOLDER / "answers"

COUNT = 24
SEED = 26  # pages of every kind, none of them long; `vl01 bench quality` reads others
MOST_TOKENS = 800

# What is shown at the end: a dataset, and what its pages were asked.
SHOWN = (("text", "read"), ("receipts", "extract receipt"), ("invoices", "extract invoice"),
         ("sentences", "describe"), ("text", "read"))  # fmt: skip

LAST_WORDS = f"""
[bold]What this shows[/]: the real code path from files and checkpoint to text and typed columns;
one row for every page, also for the damaged one; commits and checks.
[bold]What it does not[/]: VL-01's own answers. This model has its architecture at 11 million
parameters, and learnt to read pages such as these and nothing else; these it never saw.
With the real checkpoint the commands are the same.

All of it is in {FOLDER}/. Give a command of step 2 again: it finds nothing left to do."""

# Which page lies where: by the file's name, and what OUTPUT calls the member, or the page's number.
Truths = Mapping[tuple[str, str | int], Page]

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    if not (CHECKPOINT / "config.json").is_file():
        raise SystemExit(f"the demo stopped: no checkpoint in {CHECKPOINT}, where one is shipped")
    shutil.rmtree(FOLDER, ignore_errors=True)
    say(f"1. {COUNT} pages that nobody trained on, in a tar, a Parquet and a PDF; a damaged file")
    truths = write_source(held_out_pages(COUNT, FONTS["training fonts"], SEED))
    say("2. The text of the PDF, the fields of receipts and invoices, a sentence about each page")
    with ray_session("local"):
        ask("ocr", PAGES / "rest.pdf", "text")
        ask("extract", PAGES / "receipts.tar", "receipts", "--schema", "receipt")
        ask("extract", PAGES / "invoices.parquet", "invoices", "--schema", "invoice")
        # One core each: layers as small as these gain little by a second one.
        ask("caption", PAGES, "sentences", "--replicas", 2)
    say("3. Is every page there, once?")
    vl01("verify", ANSWERS / "sentences", "--deep")
    say("4. Five answers, beside what the page says")
    show_answers(truths)
    console.print(LAST_WORDS)


def say(step: str) -> None:
    console.print(f"\n[bold cyan]{step}[/]")


def ask(task: str, source: Path, name: str, *more: object) -> None:
    output = ("--output", ANSWERS / name)
    vl01(task, source, *output, "--model", CHECKPOINT, "--max-new-tokens", MOST_TOKENS, *more)


def vl01(*arguments: object) -> None:
    """Does what the command would do that a user types."""
    words = [str(argument) for argument in arguments]
    console.print(f"$ vl01 {' '.join(words)}", style="bold")
    try:
        cli.main(words)
    except SystemExit as ended:
        if ended.code:
            raise SystemExit(f"the demo stopped: vl01 {words[0]} ended with {ended.code}") from None


def write_source(pages: Sequence[Page]) -> Truths:
    """Receipts in a tar, invoices in a Parquet file, the rest in a PDF, and a file cut short."""
    PAGES.mkdir(parents=True)
    by_kind: dict[str, list[Page]] = defaultdict(list)
    for page in pages:
        by_kind[page.content.kind].append(page)
    receipts, invoices = by_kind.pop("receipt"), by_kind.pop("invoice")
    rest = [page for pages in by_kind.values() for page in pages]
    truths: dict[tuple[str, str | int], Page] = {
        ("rest.pdf", number): page for number, page in enumerate(rest, 1)
    }
    with tarfile.open(PAGES / "receipts.tar", "w") as tar:
        for i, page in enumerate(receipts):
            member, data = tarfile.TarInfo(f"receipt-{i:02}.png"), png(page)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            truths["receipts.tar", member.name] = page
    pq.write_table(
        pa.table({"image": [png(page) for page in invoices]}), PAGES / "invoices.parquet"
    )
    truths |= {("invoices.parquet", str(row)): page for row, page in enumerate(invoices)}
    first, *others = (page.image for page in rest)
    first.save(PAGES / "rest.pdf", save_all=True, append_images=others, resolution=72, quality=90)
    (PAGES / "damaged.png").write_bytes(png(pages[0])[:1000])
    console.print(
        f"{len(receipts)} pages in receipts.tar, {len(invoices)} in invoices.parquet, "
        f"{len(rest)} in rest.pdf, in {PAGES}/"
    )
    return truths


def show_answers(truths: Truths) -> None:
    """A page of each dataset, from another place each time; then how many are right in all."""
    answered: list[Answered] = []
    for number, (name, task) in enumerate(SHOWN):
        rows = pyarrow.dataset.dataset(ANSWERS / name, format="parquet").to_table().to_pylist()
        known = [
            (row, answers(page.content)[task].text) for row in rows if (page := truth(row, truths))
        ]
        show(task, *known[number * len(known) // len(SHOWN)])
        if (name, task) not in SHOWN[:number]:
            answered += [
                Answered(i, task, expected, row["text"] or "", held=task.startswith("extract"))
                for i, (row, expected) in enumerate(known)
            ]
    found, asked = score(answered), Counter(answer.task.split()[0] for answer in answered)
    console.print(
        f"\nRight are {1 - found.character_errors:.1%} of the characters of {asked['read']} pages, "
        f"{found.held_fields:.1%} of the fields of {asked['extract']}, "
        f"{found.descriptions:.1%} of {asked['describe']} sentences."
    )


def truth(row: Mapping[str, Any], truths: Truths) -> Page | None:
    name = Path(row["source"]).name
    return truths.get((name, row["member"] if row["member"] is not None else row["page"]))


def show(task: str, row: Mapping[str, Any], expected: str) -> None:
    where = row["member"] if row["member"] is not None else f"page {row['page']}"
    title = f"{task}: {Path(row['source']).name}, {where}"
    table = Table(title=escape(title), title_justify="left")
    for heading in ("the model", "the page"):
        table.add_column(heading, width=46)
    table.add_row(escape(a_field_a_line(row["text"])), escape(a_field_a_line(expected)))
    Console(highlight=False, width=100).print(table)


def a_field_a_line(text: str) -> str:
    """JSON as people read it; anything else as it is."""
    try:
        fields = json.loads(text)
    except ValueError:
        return text
    if not isinstance(fields, dict):
        return text
    values = {key: json.dumps(value, ensure_ascii=False) for key, value in fields.items()}
    return "\n".join(f"{key}: {value}" for key, value in values.items())


if __name__ == "__main__":
    main()
