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
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from model.nano.random_checkpoint import write_random_checkpoint

FOLDER = Path("demo-output")
IMAGES, CHECKPOINT, OUTPUT = FOLDER / "images", FOLDER / "checkpoint", FOLDER / "captions"

PAGE = (496, 702)  # pixels; an A4 sheet at 60 dpi
SKIMAGE_PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png"),
    *("coffee.png", "coins.png", "color.png", "grass.png", "horse.png", "hubble_deep_field.jpg"),
    *("ihc.png", "logo.png", "moon.png", "motorcycle_left.png", "no_time_for_that_tiny.gif"),
    *("page.png", "retina.jpg", "rocket.jpg", "text.png"),
)

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    say(
        "1. A source: a folder with photographs, a tar and a Parquet file of pages, 3 damaged files"
    )
    write_source()
    say("2. A checkpoint in VL-01's layout: 8 layers, 8 experts, random weights")
    write_random_checkpoint(CHECKPOINT)
    say("3. Captions, by a model split over two processes")
    vl01("caption", IMAGES, "--output", OUTPUT, "--model", CHECKPOINT,
         "--pp", 2, "--max-new-tokens", 24)  # fmt: skip
    say("4. Is every image there, once?")
    vl01("verify", OUTPUT, "--deep")
    say("5. The dataset, as three libraries read it")
    read_back()
    console.print(
        "\n[bold]What this shows:[/] one row for every image and every damaged file, each with its "
        "status; the real tiling, prompt, int8 weights, engine, commits and checks.\n"
        "[bold]What it does not:[/] captions. The weights are random, so the text is noise. "
        "With the real checkpoint the command is the same.\n"
        f"All of it is in {FOLDER}/; give the command of step 3 again to see that nothing is done "
        "twice."
    )


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
    show_rows(pa.concat_tables([table.slice(0, 5), failed(table), table.slice(table.num_rows - 3)]))


def failed(table: pa.Table) -> pa.Table:
    return table.filter(pc.field("status") == "failed")


def show_rows(rows: pa.Table) -> None:
    shown = Table("source", "member", "status", "reason", "tiles", "text or message")
    for row in rows.to_pylist():
        words = " ".join((row["text"] or row["message"] or "").split())
        cells = (row["member"], row["status"], row["reason"], row["tiles"], words[:60])
        shown.add_row(Path(row["source"]).name, *("" if c is None else str(c) for c in cells))
    console.print(shown, markup=False)


if __name__ == "__main__":
    main()
