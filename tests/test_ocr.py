"""`vl01 ocr` as users run it, with a model that goes round in circles on every page."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from model.nano import random_checkpoint
from schemas.job import Job
from tests.images import encode, page
from tests.test_end_to_end import command, read, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MOST = 600  # tokens of an answer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def looping(tmp_path_factory) -> Path:
    """Of a word it thinks of that word: layers write next to nothing, and the head is the
    embedding."""
    gains = {"out_proj.weight": 0.01, "o_proj.weight": 0.01, "w2.weight": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_checkpoint, "_GAINS", gains)
        folder = _checkpoint(tmp_path_factory.mktemp("looping"))
    embedding, head = (
        f"language_model.{name}.weight" for name in ("model.embed_tokens", "lm_head")
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    words = load_file(folder / index[embedding])[embedding]
    shard = load_file(folder / index[head])
    save_file(shard | {head: words * 0.1}, folder / index[head])
    return folder


def _checkpoint(folder: Path) -> Path:
    return random_checkpoint.write_random_checkpoint(
        folder, seed=3, tile=56, hidden_size=64, heads=2, kv_heads=1, experts=4,
        intermediate_size=64, vision_hidden_size=32, vision_intermediate_size=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for number in range(3):
        data = encode(page(number, (300, 420)), "PNG")
        for name in ("a", "b"):  # each twice
            (folder / f"{number}-{name}.png").write_bytes(data)
    (folder / "blank.png").write_bytes(encode(Image.new("RGB", (300, 420), "white"), "PNG"))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return folder


def ocr(pages: Path, output: Path, checkpoint: Path, *flags: object) -> list[str]:
    small = ["--max-new-tokens", MOST, "--max-sequences", 8, "--prompt", "Read it.", *flags]
    return command("ocr", pages, "--output", output, "--model", checkpoint, *small)


def rows_by_name(output: Path) -> dict[str, dict]:
    return {Path(row["source"]).stem: row for row in read(output).to_pylist()}


def test_loops_end_poor_pages_are_tried_again_and_copies_and_blanks_cost_nothing(
    tmp_path, looping, pages
):
    shown = run(ocr(pages, tmp_path / "out", looping, "--retries", 1))
    rows = rows_by_name(tmp_path / "out")
    assert len(rows) == 8
    assert (rows["broken"]["status"], rows["broken"]["attempts"]) == ("failed", 0)
    blank = rows.pop("blank")
    assert (blank["status"], blank["reason"], blank["text"], blank["attempts"]) == (
        "ok", "blank", "", 0,
    )  # fmt: skip
    assert (blank["width"], blank["height"]) == (300, 420)
    del rows["broken"]
    for name, row in rows.items():
        assert (row["status"], row["reason"]) == ("truncated", "repetition")
        assert (row["finish_reason"], row["attempts"]) == ("repetition", 2)
        assert row["output_tokens"] < MOST / 2
        twin = rows[name[:-1] + ("b" if name.endswith("a") else "a")]
        own = ("row_id", "source")
        assert {k: v for k, v in row.items() if k not in own} == {
            k: v for k, v in twin.items() if k not in own
        }
    assert "copied   3 from identical images" in shown.stdout
    run(command("verify", tmp_path / "out", "--deep"))
    stored = json.loads((tmp_path / "out" / "_vl01" / "job.json").read_text())["job"]
    assert Job.model_validate(stored).ladder[0].temperature == 0.4


def test_rows_are_the_same_in_other_batches_with_another_number_of_sequences(
    tmp_path, checkpoint, pages
):
    # Unsure of everything, it has its pages turned.
    flags = "--temperature", 0.7, "--retries", 2, "--max-new-tokens", 40, "--unit-rows"
    run(ocr(pages, tmp_path / "one", checkpoint, *flags, 2, "--max-sequences", 1))
    run(ocr(pages, tmp_path / "two", checkpoint, *flags, 256, "--max-sequences", 8))
    rows = rows_by_name(tmp_path / "one")
    assert rows == rows_by_name(tmp_path / "two")
    assert {row["attempts"] for row in rows.values()} == {0, 3}
    assert len({row["text"] for row in rows.values()}) == 3 + 1 + 1  # pages, blank, broken
