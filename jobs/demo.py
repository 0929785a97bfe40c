"""`make demo`: real images through the whole of `vl01`, with a small random checkpoint, on CPU.

    python -m jobs.demo

Makes demo-output/ anew, then only types commands and reads the dataset back, as a user would.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model.nano.random_checkpoint import write_random_checkpoint

FOLDER = Path("demo-output")
IMAGES, CHECKPOINT, OUTPUT = FOLDER / "images", FOLDER / "checkpoint", FOLDER / "captions"

PAGE = (470, 665)  # pixels; an A4 sheet at 57 dpi, which fits 2x2 tiles
SKIMAGE_PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png"),
    *("coffee.png", "coins.png", "color.png", "grass.png", "horse.png", "hubble_deep_field.jpg"),
    *("ihc.png", "logo.png", "moon.png", "motorcycle_left.png", "no_time_for_that_tiny.gif"),
    *("microaneurysms.png", "page.png", "rocket.jpg", "text.png"),
)

LAST_WORDS = f"""
[bold]What this shows[/]: one row for every image, also for the damaged ones, each with
its status; the real code path from checkpoint and pixels to text; commits,
checks, and a dataset that other tools read.
[bold]What it does not[/]: captions. The weights are random, so the text is noise, and
seldom ends by itself: most rows are cut at --max-new-tokens (truncated).
With the real checkpoint the commands are the same.

All of it is in {FOLDER}/. Give the command of step 3 again: it finds nothing left to do."""

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    say("1. A source: photographs, a tar and a Parquet file of pages, three damaged files")
    write_source()
    say("2. A checkpoint in VL-01's layout: 8 layers, 8 experts, random weights")
    write_random_checkpoint(CHECKPOINT)
    say("3. Captions, by a model split over two processes")
    vl01("caption", IMAGES, "--output", OUTPUT, "--model", CHECKPOINT,
         "--pp", 2, "--temperature", 0.4, "--max-new-tokens", 48)  # fmt: skip
    say("4. Is every image there, once?")
    vl01("verify", OUTPUT, "--deep")
    say("5. The dataset, as three libraries read it")
    read_back()
    console.print(LAST_WORDS)


def say(step: str) -> None:
    console.print(f"\n[bold cyan]{step}[/]")


def vl01(*arguments: object) -> None:
    """Runs the command that a user would type, in a process of its own."""
    words = [str(argument) for argument in arguments]
    console.print(f"$ vl01 {' '.join(words)}", style="bold")
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *words])
    if done.returncode:
        raise SystemExit(f"the demo stopped: vl01 {words[0]} ended with {done.returncode}")


def write_source() -> None:
    """Photographs as the files they are, pages in a tar and in a Parquet file, damaged files."""
    IMAGES.mkdir(parents=True)
    for photograph in photographs():
        shutil.copy(photograph, IMAGES)
    pages = [jpeg(draw_page(number)) for number in range(14)]
    with tarfile.open(IMAGES / "letters.tar", "w") as tar:
        for number, data in enumerate(pages[:7]):
            member = tarfile.TarInfo(f"letter-{number:03}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    rows = [{"bytes": data, "path": f"invoice-{i}.jpg"} for i, data in enumerate(pages[7:])]
    pq.write_table(pa.table({"image": rows}), IMAGES / "invoices.parquet")
    (IMAGES / "cut-in-the-middle.jpg").write_bytes(pages[0][: len(pages[0]) // 2])
    (IMAGES / "not-an-image.jpg").write_text("This is text under the name of a photograph.\n")
    (IMAGES / "empty.png").touch()
    files = sum(path.suffix not in (".tar", ".parquet") for path in IMAGES.iterdir())
    console.print(f"{files} files, 7 pages in letters.tar, 7 in invoices.parquet, in {IMAGES}/")


def photographs() -> list[Path]:
    """Files that scikit-learn and scikit-image bring along."""
    sklearn, skimage = package("sklearn"), package("skimage")
    names = [sklearn / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    return names + [skimage / "data" / name for name in SKIMAGE_PHOTOGRAPHS]


def package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the demo needs {name}: pip install 'vl01-batch[demo]', or make demo")
    return Path(spec.submodule_search_locations[0])


def draw_page(number: int) -> Image.Image:
    """An invoice if the number is 7 or more, else a letter."""
    title, lines = invoice(number) if number >= 7 else letter(number)
    page = Image.new("RGB", PAGE, "white")
    draw = ImageDraw.Draw(page)
    left, right = 40, PAGE[0] - 40
    draw.text((left, 40), title, "black", ImageFont.load_default(22))
    draw.line((left, 80, right, 80), "black", 2)
    font = ImageFont.load_default(14)
    for row, (words, price) in enumerate(lines):
        draw.text((left, 100 + 26 * row), words, "black", font)
        draw.text((right, 100 + 26 * row), price, "black", font, anchor="ra")
    return page


def invoice(number: int) -> tuple[str, list[tuple[str, str]]]:
    """A title, and lines of words and a price."""
    prices = [(number * 37 + item * 61) % 400 + 20 for item in range(12)]
    items = [(f"{price % 5 + 1} x item {price}", f"{price}.00 EUR") for price in prices]
    head, foot = ("To the reader, 1 Long Street", ""), ("Total", f"{sum(prices)}.00 EUR")
    return f"Invoice {2000 + number}", [head, ("", ""), *items, ("", ""), foot]


def letter(number: int) -> tuple[str, list[tuple[str, str]]]:
    days = [f"On day {number + day} the photographs were counted, and" for day in range(1, 6)]
    lines = [line for day in days for line in (day, "not one of them was missing.")]
    return "Dear reader,", [(line, "") for line in (*lines, "", "Yours,", "the demo")]


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def read_back() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` shall not look anything up
    import pandas
    import pyarrow.dataset
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    table = pyarrow.dataset.dataset(OUTPUT, format="parquet").to_table()
    frame = pandas.read_parquet(OUTPUT)
    dataset = load_dataset(str(OUTPUT), split="train", cache_dir=str(FOLDER / "cache"))
    console.print(f"pyarrow   {table.num_rows} rows, {table.num_columns} columns")
    console.print(f"pandas    {frame.shape[0]} rows, {frame.status.value_counts().to_dict()}")
    console.print(f"datasets  {len(dataset)} rows, such as row 0: {dataset[0]['source']}\n")
    show_rows(table)


def show_rows(table: pa.Table) -> None:
    """The damaged files, and some rows of each kind of source."""
    rows = table.to_pylist()
    failed = [row for row in rows if row["status"] == "failed"]
    files = [row for row in rows if row["member"] is None and row not in failed]
    members = [row for row in rows if row["member"] is not None]
    shown = Table("image", "status", "text, or why there is none")
    for row in (*failed, *files[:4], *members[:2], *members[-2:]):
        name = "/".join(filter(None, (Path(row["source"]).name, row["member"])))
        words = row["text"] or f"{row['reason']}: {row['message']}"
        short = " ".join(words.split())[:33] + "…"  # a table of 80 columns
        shown.add_row(*map(escape, (name, row["status"], short)))
    Console(highlight=False).print(shown)


if __name__ == "__main__":
    main()
