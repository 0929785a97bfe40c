"""A folder of documents as users run it: good, damaged and hostile ones, with real Ray."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.documents import encrypted_pdf, endless_pdf, pdf, tiff
from tests.images import bad_images, page
from tests.pipeline.test_read import tar_of
from tests.sources import write_folder
from tests.test_end_to_end import caption, checkpoint, command, read, run  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MANY = 150  # pages of one document


def documents() -> dict[str, tuple[bytes, list[tuple[int | None, str | None]]]]:
    """By name, its bytes and the (page, reason) that its rows must have."""
    frames = [page(seed, (300, 400)) for seed in range(3)]
    cut = tiff(frames)[: len(tiff(frames)) * 2 // 3]
    inside = {"a.pdf": pdf(["x"] * 2), "b.pdf": encrypted_pdf(), "c.tif": tiff(frames)}
    of_inside = [*pages(2), (None, "encrypted"), *pages(3)]
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": list(inside.values())}), table)
    bombs = {name: data for name, data, _ in bad_images() if name == "huge.png"}
    found = {
        f"{i:02}.pdf": (pdf([f"{i} {j}" for j in range(i % 4 + 1)]), pages(i % 4 + 1))
        for i in range(30)
    }
    return found | {
        "00-many.pdf": (pdf(["x"] * MANY), pages(MANY)),
        "cut.pdf": (pdf(["x"])[:200], [(None, "source_damaged")]),
        "cut.tif": (cut, [*pages(2), (None, "source_damaged")]),
        "empty.pdf": (b"", [(None, "empty_file")]),
        "encrypted.pdf": (encrypted_pdf(), [(None, "encrypted")]),
        "endless.pdf": (endless_pdf(2), [(1, "timeout"), (2, "timeout")]),
        "inside.parquet": (table.getvalue().to_pybytes(), of_inside),
        "inside.tar": (tar_of(inside), of_inside),
        "huge.png": (bombs["huge.png"], [(None, "too_many_pixels")]),
        "no-pages.pdf": (pdf([]), [(None, "empty_source")]),
        "one.tif": (tiff(frames[:1]), [(None, None)]),
        "three.tif": (tiff(frames), pages(3)),
        "too-many.pdf": (pdf(["x"] * (MANY + 1)), [(None, "too_many_pages")]),
        "wide.pdf": (pdf(["x"], size=(100_000, 100_000)), pages(1)),
    }


def pages(count: int) -> list[tuple[int | None, str | None]]:
    return [(number, None) for number in range(1, count + 1)]


def test_every_page_is_a_row_and_what_cannot_be_read_is_one_with_its_reason(
    tmp_path,
    checkpoint,  # noqa: F811
):
    source, output = tmp_path / "in", tmp_path / "out"
    wanted = documents()
    write_folder(source, [(name, data) for name, (data, _) in wanted.items()])
    limits = ["--page-seconds", 3, "--max-pages", MANY, "--max-failure-rate", 1]
    run(caption(source, output, checkpoint, "--markdown", *limits))
    run(command("verify", output, "--deep"))

    rows = read(output).to_pylist()
    found: dict[str, list[tuple[int | None, str | None]]] = {name: [] for name in wanted}
    for row in rows:
        reason = row["reason"] if row["status"] == "failed" else None
        found[Path(row["source"]).name].append((row["page"], reason))
        assert (row["text"] is None) == (row["status"] == "failed")
    assert found == {name: expected for name, (_, expected) in wanted.items()}

    joined = ds.dataset(output / "_vl01/documents", format="parquet").to_table().to_pylist()
    assert {Path(row["source"]).name for row in joined} == wanted.keys() - {"huge.png"}
    counted = Counter(row["status"] for row in rows if not row["source"].endswith(".png"))
    for status in ("ok", "truncated", "invalid", "failed"):
        assert sum(row[status] for row in joined) == counted[status]
    assert (output / "_vl01/markdown/00-many.pdf.md").exists()
