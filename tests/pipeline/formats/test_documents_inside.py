"""Documents inside of tars and Parquet files are pages too, and a bad one costs its own row."""

import io
import pickle
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import lease, storage
from pipeline.plan import Plan, row_id
from pipeline.read import ReadSettings, read_unit
from pipeline.render.renderer import Renderer
from pipeline.render.settings import PageSettings
from pipeline.retry import Choice
from pipeline.sources import open_source
from pipeline.verify import verify
from schemas.ledger import Unit, UnitKind
from tests.documents import encrypted_pdf, endless_pdf, pdf, tiff
from tests.images import encode, page
from tests.pipeline.fake_run import job_of, run
from tests.pipeline.test_read import tar_of
from tests.pipeline.test_retry import retry, rows
from tests.pipeline.test_verify import rewrite

PAGES = PageSettings(((112, 112),), max_pages=5)
FRAMES = [page(seed, (90, 120)) for seed in range(3)]
PNG = encode(FRAMES[0], "PNG")
DAMAGED = Choice(frozenset({"failed"}), frozenset({"source_damaged", "encrypted", "page_damaged"}))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)


def read(address: object, pages: PageSettings = PAGES, keep: tuple[str, ...] = ()) -> list[dict]:
    """All rows of a source, after checks that hold for any."""
    source = open_source(str(address))
    plan = Plan(source, 100, keep=keep)
    units = list(plan.units())
    settings = ReadSettings(source, 10**6, kept=plan.kept(), pages=pages)
    settings = pickle.loads(pickle.dumps(settings))
    found = [row for u in units for t in read_unit(u, settings) for row in t.to_pylist()]
    for row in found:
        name = row["source"].removeprefix(f"{address}/")
        assert row["row_id"] == row_id(name, row["member"], row["page"])
        assert (row["data"] is None) == (row["reason"] is not None)
    assert len({row["row_id"] for row in found}) == len(found)
    return found


def outcomes(found: list[dict]) -> list[tuple]:
    return [(row["member"], row["page"], row["reason"]) for row in found]


MEMBERS = {
    "a.pdf": pdf(["one", "two"]),
    "b.PDF": encrypted_pdf(),
    "c.pdf": pdf(["one"])[:200],
    "d.png": PNG,
    "e.pdf": pdf([]),
    "f.pdf": pdf(["x"] * 6),
    "g.pdf": pdf(["x"]) + b"%" * 10**6,
    "h.tif": tiff(FRAMES),
    "i.tif": tiff(FRAMES[:1]),
    "j.png": PNG,
}
OUTCOMES = [
    ("a.pdf", 1, None),
    ("a.pdf", 2, None),
    ("b.PDF", None, "encrypted"),
    ("c.pdf", None, "source_damaged"),
    ("d.png", None, None),
    ("e.pdf", None, "empty_source"),
    ("f.pdf", None, "too_many_pages"),
    ("g.pdf", None, "too_many_bytes"),
    ("h.tif", 1, None),
    ("h.tif", 2, None),
    ("h.tif", 3, None),
    ("i.tif", None, None),
    ("j.png", None, None),
]


def test_a_tar_gives_the_pages_of_its_documents_among_its_images(tmp_path):
    more = {"k.pdf": b"", "l.pdf": b"no document", ".m.pdf": pdf(["x"]), "n.txt": b"%PDF-"}
    (tmp_path / "a.tar").write_bytes(tar_of({**MEMBERS, **more}))
    found = read(tmp_path)
    assert outcomes(found) == [
        *OUTCOMES,
        ("k.pdf", None, None),  # as any empty file: preparing it says so
        ("l.pdf", None, "source_damaged"),
    ]
    whole = {row["member"]: row["data"] for row in found if row["data"] and not row["page"]}
    assert whole == {name: MEMBERS[name] for name in ("d.png", "i.tif", "j.png")}
    assert all(row["data"].startswith(b"\x89PNG") for row in found if row["page"])


@pytest.mark.parametrize("column", ["bytes", "struct", "uri"])
def test_a_parquet_file_gives_the_pages_of_its_documents_among_its_images(tmp_path, column):
    images: list = list(MEMBERS.values())
    settings = {}
    if column == "struct":
        images = [{"bytes": data, "path": None} for data in images]
    if column == "uri":
        settings["uri_column"] = "image"
        images = [f"files/{i}" for i in range(len(images))]
        (tmp_path / "files").mkdir()
        for i, data in enumerate(MEMBERS.values()):
            (tmp_path / f"files/{i}").write_bytes(data)
    table = pa.table({"image": images, "name": list(MEMBERS)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    source = open_source(str(tmp_path / "a.parquet"))
    plan = Plan(source, 4, keep=("name",), uri_column=settings.get("uri_column"))
    units = list(plan.units())
    assert len(units) == 3
    told = ReadSettings(source, 10**6, kept=plan.kept(), pages=PAGES, **settings)
    found = [row for u in units for t in read_unit(u, told) for row in t.to_pylist()]
    assert [(row["name"], row["page"], row["reason"]) for row in found] == OUTCOMES
    numbers = {name: str(i) for i, name in enumerate(MEMBERS)}
    assert all(row["member"] == numbers[row["name"]] for row in found)
    assert len({row["row_id"] for row in found}) == len(OUTCOMES)


def test_a_document_that_comes_twice_in_a_tar_is_the_pages_of_two(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for data in (pdf(["one"]), pdf(["two", "three"])):
            info = tarfile.TarInfo("a.pdf")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    expected = [("a.pdf", 1, None), ("a.pdf#2", 1, None), ("a.pdf#2", 2, None)]
    assert outcomes(read(tmp_path)) == expected


@pytest.mark.parametrize("cut", [300, 700])
def test_a_tar_that_is_cut_within_a_document_gives_its_good_rows_and_says_so(tmp_path, cut):
    data = tar_of({"a.png": b"A", "b.pdf": pdf(["one"])})
    (tmp_path / "a.tar").write_bytes(data[: 1024 + cut])
    assert outcomes(read(tmp_path)) == [("a.png", None, None), (None, None, "source_damaged")]


def test_a_hostile_document_in_a_tar_does_not_hold_up_those_behind_it(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"a.pdf": endless_pdf(3), "b.pdf": pdf(["one"])}))
    settings = PageSettings(((112, 112),), page_seconds=1.0, document_seconds=1.5)
    assert outcomes(read(tmp_path, settings)) == [
        *[("a.pdf", number, "timeout") for number in (1, 2, 3)],
        ("b.pdf", 1, None),
    ]


def test_documents_of_a_tar_in_a_bucket_are_those_on_a_disk(tmp_path):
    fs = fsspec.filesystem("memory")
    (tmp_path / "a.tar").write_bytes(tar_of(MEMBERS))
    fs.pipe_file("/tars/a.tar", tar_of(MEMBERS))
    try:
        there, here = read("memory:///tars"), read(tmp_path)
    finally:
        fs.rm("/tars", recursive=True)
    assert [row["data"] for row in there] == [row["data"] for row in here]
    assert outcomes(there) == OUTCOMES


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_long_document_inside_is_never_in_memory_as_a_whole(tmp_path, monkeypatch, kind):
    data = pdf(["x"] * 300)
    if kind == "tar":
        (tmp_path / "a.tar").write_bytes(tar_of({"a.pdf": data}))
        unit = Unit(0, UnitKind.TAR, ("a.tar",))
    else:
        pq.write_table(pa.table({"image": [data]}), tmp_path / "a.parquet")
        unit = Unit(0, UnitKind.PARQUET, ("a.parquet",), 0, 1)
    monkeypatch.setattr("pipeline.render.renderer.Renderer.image", lambda _, n: bytes(2**20))
    pages = replace(PAGES, max_pages=300)
    settings = ReadSettings(open_source(str(tmp_path)), 10**6, pages=pages)
    tracemalloc.start()
    tables = read_unit(unit, settings)
    assert next(tables)["page"].to_pylist() == list(range(1, 17))
    assert sum(table.num_rows for table in tables) == 300 - 16
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 2**20


# Done again


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.write_bytes(tar_of(members))


def write_parquet(path: Path, members: dict[str, bytes]) -> None:
    pq.write_table(pa.table({"image": list(members.values())}), path, row_group_size=2)


@pytest.mark.parametrize(("ending", "write"), [("tar", write_tar), ("parquet", write_parquet)])
def test_a_retry_replaces_a_stand_in_by_its_pages_and_opens_no_other(
    tmp_path, monkeypatch, ending, write
):
    """a.pdf is whole, b.pdf damaged, c.png too, d.pdf encrypted, e.tif cut behind two frames."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    path = source / f"a.{ending}"
    cut = tiff([page(seed, (300, 400)) for seed in range(3)])
    members = {
        "a.pdf": pdf(["one", "two"]),
        "b.pdf": pdf(["one"])[:200],
        "c.png": PNG,
        "d.pdf": encrypted_pdf(),
        "e.tif": cut[: len(cut) * 2 // 3],
        "f.pdf": pdf(["one"]),
    }
    names = dict(zip(members, members if ending == "tar" else "012345", strict=True))
    write(path, members)
    run(job_of(source, output))
    before = rows(output)
    assert len(before) == 2 + 1 + 1 + 1 + 3 + 1
    assert verify(str(output), deep=True).ok

    mended = {"b.pdf": pdf(["x"] * 3), "e.tif": cut}
    write(path, {**members, **mended})
    opened = []
    whole = Renderer.open
    monkeypatch.setattr(
        Renderer, "open", lambda self, path: opened.append(path) or whole(self, path)
    )
    summary = retry(source, output, DAMAGED, max_bytes=10**7)
    after = rows(output)
    name = path.name
    gone = {row_id(name, names["b.pdf"]), row_id(name, names["e.tif"])}
    new = {row_id(name, names["b.pdf"], number) for number in (1, 2, 3)}
    new.add(row_id(name, names["e.tif"], 3))
    assert after.keys() == before.keys() - gone | new
    assert {after[row]["status"] for row in new} == {"ok"}
    failed_again = row_id(name, names["d.pdf"])
    assert after[failed_again]["reason"] == "encrypted"
    untouched = before.keys() & after.keys() - {failed_again}
    assert all(after[row] == before[row] for row in untouched)
    assert (summary.added, summary.rows) == (4, {"ok": 4, "failed": 1})
    assert len(opened) == 3
    found = verify(str(output), deep=True)
    assert found.ok, found.problems
    assert (found.rows, found.statuses) == (11, {"ok": 10, "failed": 1})


def test_documents_are_known_again_once_their_tar_is_whole(tmp_path):
    """It was still being written. b.pdf opens now, and its stand-in goes; of d.pdf, which opens no
    more, there are pages already. What was behind the cut comes."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    broken, whole = pdf(["one"])[:200], pdf(["one", "two"])
    members = {"a.png": PNG, "b.pdf": broken, "c.pdf": encrypted_pdf(), "d.pdf": whole}
    data = tar_of({**members, "e.png": PNG})
    (source / "a.tar").write_bytes(data[: data.index(b"e.png") + 100])
    run(job_of(source, output))
    write_tar(source / "a.tar", {**members, "b.pdf": whole, "d.pdf": broken, "e.png": PNG})
    retry(source, output, max_bytes=10**7)
    after = rows(output)
    pages = [(member, page) for member in ("b.pdf", "d.pdf") for page in (1, 2)]
    expected = [("a.png",), *pages, ("c.pdf",), ("e.png",)]
    assert after.keys() == {row_id("a.tar", *member) for member in expected}
    assert [row["reason"] for row in after.values() if row["status"] == "failed"] == ["encrypted"]


def test_a_document_that_ends_where_it_was_cut_leaves_one_row_that_says_so(tmp_path):
    """Its stand-in has nothing to be replaced by, and nothing comes beside it."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    cut = tiff([page(seed, (300, 400)) for seed in range(3)])
    write_tar(source / "a.tar", {"a.png": PNG, "e.tif": cut[: len(cut) * 2 // 3]})
    run(job_of(source, output))
    before = rows(output)
    two = tiff([page(seed, (300, 400)) for seed in range(2)])
    write_tar(source / "a.tar", {"a.png": PNG, "e.tif": two})
    retry(source, output, DAMAGED, max_bytes=10**7)
    after = rows(output)
    assert after.keys() == before.keys()
    assert after[row_id("a.tar", "e.tif")]["reason"] == "empty_source"


def test_a_page_that_went_missing_from_a_parquet_part_is_found(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write_parquet(source / "a.parquet", {"a": pdf(["one", "two"]), "b": PNG})
    ledger = run(job_of(source, output))
    assert verify(str(output), deep=True).ok
    rewrite(ledger, 0, lambda table: table.slice(2))  # both pages
    found = verify(str(output))
    assert not found.ok
    assert (found.missing_rows, found.damaged_units) == (1, 1)
    rewrite(ledger, 0, lambda table: table.set_column(0, "row_id", [["0" * 32]]))
    assert "1 that were not planned" in verify(str(output)).problems[0]
