"""Every page of every document becomes one row, and what a document lacks is said in one too."""

import pickle
import tracemalloc
from pathlib import Path

import fsspec
import pytest

from pipeline import lease, storage
from pipeline.plan import Plan, row_id
from pipeline.read import ReadSettings, read_unit
from pipeline.render.settings import PageSettings
from pipeline.retry import Choice
from pipeline.sources import open_source
from pipeline.verify import verify
from schemas.ledger import Unit, UnitKind
from tests.documents import encrypted_pdf, endless_pdf, pdf, tiff
from tests.images import page
from tests.pipeline.fake_run import job_of, run
from tests.pipeline.test_retry import retry, rows

PAGES = PageSettings(((112, 112),))
FRAMES = [page(seed, (90, 120)) for seed in range(3)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)


def read(address: object, pages: PageSettings = PAGES, max_bytes: int = 10**6) -> list[dict]:
    source = open_source(str(address))
    settings = ReadSettings(source, max_bytes, pages=pages)
    settings = pickle.loads(pickle.dumps(settings))
    units = list(Plan(source, 100).units())
    found = [row for u in units for t in read_unit(u, settings) for row in t.to_pylist()]
    for row in found:
        name = row["source"].removeprefix(f"{address}/")
        assert row["row_id"] == row_id(name, None, row["page"])
        assert (row["data"] is None) == (row["reason"] is not None)
    assert len({row["row_id"] for row in found}) == len(found)
    return found


def outcomes(found: list[dict]) -> list[tuple]:
    return [(Path(row["source"]).name, row["page"], row["reason"]) for row in found]


def test_every_page_is_a_row_and_every_broken_document_one_with_its_reason(tmp_path):
    cut = tiff([page(seed, (300, 400)) for seed in range(3)])
    documents = {
        "a.pdf": pdf(["one", "two"]),
        "b.pdf": encrypted_pdf(),
        "c.pdf": pdf([]),
        "d.pdf": pdf(["one"])[:200],
        "e.pdf": b"",
        "f.pdf": pdf(["x"] * 6),
        "g.pdf": pdf(["x"]) + b"%" * 10**6,
        "h.tif": tiff(FRAMES),
        "i.tif": tiff(FRAMES[:1]),
        "j.tif": cut[: len(cut) * 2 // 3],
        "k.tif": b"no image",
    }
    for name, data in documents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "l.pdf").symlink_to("/nowhere.pdf")
    found = read(tmp_path, PageSettings(((112, 112),), max_pages=5))
    assert outcomes(found) == [
        ("a.pdf", 1, None),
        ("a.pdf", 2, None),
        ("b.pdf", None, "encrypted"),
        ("c.pdf", None, "empty_source"),
        ("d.pdf", None, "source_damaged"),
        ("e.pdf", None, None),  # as any empty file: preparing it says so
        ("f.pdf", None, "too_many_pages"),
        ("g.pdf", None, "too_many_bytes"),
        ("h.tif", 1, None),
        ("h.tif", 2, None),
        ("h.tif", 3, None),
        ("i.tif", None, None),
        ("j.tif", 1, None),
        ("j.tif", 2, None),
        ("j.tif", None, "source_damaged"),
        ("k.tif", None, None),
        ("l.pdf", None, "not_found"),
    ]
    data = {name: row["data"] for (name, _, _), row in zip(outcomes(found), found, strict=True)}
    assert data["i.tif"] == documents["i.tif"]
    assert data["k.tif"] == documents["k.tif"]
    assert len({row["data"] for row in found if row["data"]}) == 2 + 3 + 1 + 2 + 1


def test_documents_in_a_bucket_are_those_on_a_disk(tmp_path):
    fs = fsspec.filesystem("memory")
    for name, data in {"a.pdf": pdf(["one", "two"]), "b.tif": tiff(FRAMES)}.items():
        (tmp_path / name).write_bytes(data)
        fs.pipe_file(f"/documents/{name}", data)
    try:
        there, here = read("memory:///documents"), read(tmp_path)
    finally:
        fs.rm("/documents", recursive=True)
    assert [row["data"] for row in there] == [row["data"] for row in here]
    assert [row["page"] for row in there] == [1, 2, 1, 2, 3]


def test_a_hostile_document_does_not_hold_up_those_beside_it(tmp_path):
    (tmp_path / "a.pdf").write_bytes(endless_pdf(3))
    (tmp_path / "b.pdf").write_bytes(pdf(["one"]))
    found = read(tmp_path, PageSettings(((112, 112),), page_seconds=1.0, document_seconds=1.5))
    assert outcomes(found) == [
        ("a.pdf", 1, "timeout"),
        ("a.pdf", 2, "timeout"),
        ("a.pdf", 3, "timeout"),
        ("b.pdf", 1, None),
    ]


def test_pages_arrive_in_small_tables_before_the_document_ends(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(["x"] * 40))
    settings = ReadSettings(open_source(str(tmp_path)), 10**6, pages=PAGES)
    tables = read_unit(Unit(0, UnitKind.DOCUMENTS, ("a.pdf",)), settings)
    assert next(tables)["page"].to_pylist() == list(range(1, 17))
    assert [t.num_rows for t in tables] == [16, 8]


def test_a_long_document_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf(["x"] * 300))
    monkeypatch.setattr("pipeline.render.renderer.Renderer.image", lambda _, n: bytes(2**20))
    settings = ReadSettings(open_source(str(tmp_path)), 10**6, pages=PAGES)
    tracemalloc.start()
    tables = read_unit(Unit(0, UnitKind.DOCUMENTS, ("a.pdf",)), settings)
    assert sum(table.num_rows for table in tables) == 300
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 2**20


def test_only_the_pages_that_are_done_again_are_rendered(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf(["x"] * 9))
    rendered = []
    monkeypatch.setattr(
        "pipeline.render.renderer.Renderer.image",
        lambda _, number: rendered.append(number) or b"page",
    )
    settings = ReadSettings(open_source(str(tmp_path)), 10**6, pages=PAGES)
    only = frozenset(row_id("a.pdf", None, number) for number in (3, 7))
    (table,) = read_unit(Unit(0, UnitKind.DOCUMENTS, ("a.pdf",), only=only), settings)
    assert rendered == [3, 7]
    assert table["page"].to_pylist() == [3, 7]
    assert table["unit_rows"].to_pylist() == [None, 2]


def test_a_retry_replaces_stand_ins_by_pages_and_leaves_other_documents_alone(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.pdf").write_bytes(pdf(["one", "two"]))
    (source / "b.pdf").write_bytes(encrypted_pdf())
    (source / "c.pdf").write_bytes(pdf(["one"])[:200])
    (source / "d.tif").write_bytes(tiff(FRAMES[:1]))
    run(job_of(source, output))
    before = rows(output)
    assert sorted(str(row["reason"]) for row in before.values() if row["status"] != "ok") == [
        "encrypted",
        "source_damaged",
    ]

    (source / "a.pdf").unlink()  # its pages are known: they stay
    (source / "c.pdf").write_bytes(pdf(["one", "two", "three"]))
    damaged = Choice(frozenset({"failed"}), frozenset({"source_damaged"}))
    summary = retry(source, output, damaged, max_bytes=10**6)
    after = rows(output)
    mended = {row_id("c.pdf", None, number) for number in (1, 2, 3)}
    assert after.keys() == before.keys() - {row_id("c.pdf")} | mended
    assert {after[row]["status"] for row in mended} == {"ok"}
    assert all(after[row] == before[row] for row in before.keys() & after.keys())
    assert summary.rows == {"ok": 3}
    found = verify(str(output), deep=True)
    assert found.ok
    assert (found.rows, found.statuses) == (7, {"ok": 6, "failed": 1})
