"""Joined documents say what the rows say, add up to them, and follow them through retries."""

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline import documents, lease, storage
from pipeline.documents import join_pages, write_documents
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.retry import Choice
from pipeline.sources import open_source
from pipeline.verify import verify
from schemas.errors import LedgerError
from schemas.rows import DOCUMENTS, Status
from tests.documents import encrypted_pdf, pdf, tiff
from tests.images import encode, page
from tests.pipeline.fake_run import job_of, run
from tests.pipeline.test_read import tar_of
from tests.pipeline.test_retry import retry


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def ran(tmp_path) -> tuple[Path, Path]:
    """A source of 20 documents and an image, and the output of a run over it."""
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    for i in range(16):
        (source / f"sub/{i:02}.pdf").write_bytes(pdf([f"{i} {j}" for j in range(i % 4 + 1)]))
    (source / "a.pdf").write_bytes(encrypted_pdf())
    (source / "b.pdf").write_bytes(pdf(["x"])[:200])
    (source / "c.tif").write_bytes(tiff([page(i, (90, 120)) for i in range(2)]))
    (source / "d.tif").write_bytes(tiff([page(0, (90, 120))]))
    (source / "e.png").write_bytes(encode(page(0, (90, 120)), "PNG"))
    run(job_of(source, output))
    return source, output


def write(source: Path, output: Path, **keys) -> None:
    ledger = Ledger(str(output))
    with Lease(ledger):
        ledger.resume()
        write_documents(job_of(source, output, **keys), ledger, open_source(str(source)))


def joined(output: Path) -> dict[str, dict]:
    table = ds.dataset(output / "_vl01/documents", format="parquet").to_table()
    assert table.schema.equals(DOCUMENTS)
    return {row["source"]: row for row in table.to_pylist()}


def files(output: Path) -> dict[str, tuple[bytes, int]]:
    found = [*output.glob("_vl01/documents/*"), *output.glob("_vl01/markdown/**/*.md")]
    return {
        str(p.relative_to(output / "_vl01")): (p.read_bytes(), p.stat().st_mtime_ns) for p in found
    }


def row(number: int | None, text: str | None, status: Status = Status.OK) -> dict:
    return {
        "row_id": f"r{number}",
        "source": "a.pdf",
        "page": number,
        "status": status,
        "reason": None if text else "timeout",
        "text": text,
    }


def test_spans_find_each_page_in_the_joined_text():
    rows = [
        row(3, "drei ü"),
        row(None, None, Status.FAILED),
        row(1, "one 🙂"),
        row(2, None, Status.FAILED),
        row(4, ""),
        row(5, "five", Status.TRUNCATED),
    ]
    found = join_pages("a.pdf", None, rows)
    assert found["text"] == "one 🙂\n\ndrei ü\n\nfive"
    assert [p["page"] for p in found["pages"]] == [1, 2, 3, 4, 5, None]
    for told in found["pages"]:
        (was,) = [r["text"] for r in rows if r["page"] == told["page"]]
        assert found["text"][told["start"] : told["end"]] == (was or "")
    assert {name: found[name] for name in ("ok", "truncated", "invalid", "failed")} == {
        "ok": 3,
        "truncated": 1,
        "invalid": 0,
        "failed": 2,
    }
    assert found["page_count"] == 5


def test_documents_add_up_to_the_rows_and_are_no_part_of_the_dataset(ran):
    source, output = ran
    write(source, output, documents=True)
    rows = ds.dataset(output, format="parquet").to_table().to_pylist()
    of_documents = [r for r in rows if not r["source"].endswith(".png")]
    assert len(rows) == len(of_documents) + 1 == 1 + 1 + 2 + 1 + 4 * (1 + 2 + 3 + 4) + 1
    found = joined(output)
    assert found.keys() == {r["source"] for r in of_documents}
    assert sum(d[s.value] for d in found.values() for s in Status) == len(of_documents)
    listed = [p["row_id"] for d in found.values() for p in d["pages"]]
    assert sorted(listed) == sorted(r["row_id"] for r in of_documents)
    for r in of_documents:
        document = found[r["source"]]
        (told,) = [p for p in document["pages"] if p["row_id"] == r["row_id"]]
        assert (told["page"], told["status"]) == (r["page"], r["status"])
        assert document["text"][told["start"] : told["end"]] == (r["text"] or "")
    assert found[f"{source}/sub/03.pdf"]["page_count"] == 4
    assert found[f"{source}/a.pdf"]["page_count"] is None
    assert verify(str(output), deep=True).ok


def test_they_are_written_when_asked_for_and_then_kept_up_to_date(ran):
    source, output = ran
    write(source, output)
    assert files(output) == {}
    write(source, output, documents=True)
    first = files(output)
    assert {name.split("/")[0] for name in first} == {"documents"}
    write(source, output, documents=True)
    assert files(output) == first  # nothing has changed, so nothing was written
    write(source, output, markdown=True)
    markdown = {name for name in files(output) if name.startswith("markdown/")}
    assert len(markdown) == 18  # no file for what could not be opened
    assert "markdown/sub/03.pdf.md" in markdown

    before = files(output)
    (source / "b.pdf").write_bytes(pdf(["one", "two"]))
    retry(source, output, Choice(frozenset({"failed"})), max_bytes=10**6)
    write(source, output)  # as a retry does, without being asked
    after = files(output)
    assert after.keys() - before.keys() == {"markdown/b.pdf.md"}
    assert joined(output)[f"{source}/b.pdf"]["ok"] == 2
    changed = [name for name in before if after[name] != before[name]]
    assert [name for name in changed if name.startswith("documents/")] == [
        "documents/part-000000000.parquet"
    ]


def test_a_document_that_was_replaced_by_a_damaged_one_keeps_no_text_of_the_old(ran):
    source, output = ran
    write(source, output, markdown=True)
    before = files(output)
    (source / "sub/03.pdf").write_bytes(b"no pdf")
    run(job_of(source, output, grow=True, settle_seconds=0))
    write(source, output)
    assert joined(output)[f"{source}/sub/03.pdf"]["text"] == ""
    assert before.keys() - files(output).keys() == {"markdown/sub/03.pdf.md"}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_document_that_vanished_from_its_file_keeps_no_text(tmp_path, kind):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()

    def write_source(members: dict[str, bytes]) -> None:
        if kind == "tar":
            (source / "x.tar").write_bytes(tar_of(members))
        else:
            pq.write_table(pa.table({"image": list(members.values())}), source / "x.parquet")

    write_source({"a.pdf": pdf(["one"]), "b.pdf": pdf(["two"]), "c.pdf": encrypted_pdf()})
    run(job_of(source, output))
    write(source, output, markdown=True)
    folder = output / f"_vl01/markdown/x.{kind}"
    assert len(list(folder.iterdir())) == 2
    write_source({"a.pdf": pdf(["changed", "since"])})
    run(job_of(source, output, grow=True, settle_seconds=0))
    write(source, output)
    assert [path.name for path in folder.iterdir()] == ["a.pdf.md" if kind == "tar" else "0.md"]


def test_what_was_cut_short_is_done_by_the_next_run(ran, monkeypatch):
    source, output = ran
    whole = documents._write_markdown
    written = []

    def break_after_five(ledger, name, text):
        if len(written) == 5:
            raise OSError("disk full")
        written.append(name)
        whole(ledger, name, text)

    monkeypatch.setattr(documents, "_write_markdown", break_after_five)
    with pytest.raises(LedgerError, match=r"disk full\. All rows are committed"):
        write(source, output, markdown=True)
    monkeypatch.undo()
    write(source, output, markdown=True)
    assert len([name for name in files(output) if name.endswith(".md")]) == 18
    assert len(joined(output)) == 20


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_documents_inside_of_a_file_are_joined_by_their_member(tmp_path, kind):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    members = {
        "a/b.pdf": pdf(["one", "two", "three"]),
        "c.png": encode(page(0, (90, 120)), "PNG"),
        "d.pdf": encrypted_pdf(),
        "e.tif": tiff([page(i, (90, 120)) for i in range(2)]),
    }
    if kind == "tar":
        (source / "x.tar").write_bytes(tar_of(members))
    else:
        pq.write_table(pa.table({"image": list(members.values())}), source / "x.parquet")
    run(job_of(source, output))
    write(source, output, markdown=True)
    found = ds.dataset(output / "_vl01/documents", format="parquet").to_table().to_pylist()
    names = list(members) if kind == "tar" else list("0123")
    assert [(row["member"], row["page_count"], row["ok"], row["failed"]) for row in found] == [
        (names[0], 3, 3, 0),
        (names[2], None, 0, 1),
        (names[3], 2, 2, 0),
    ]
    assert {row["source"] for row in found} == {f"{source}/x.{kind}"}
    written = sorted(path.name for path in (output / f"_vl01/markdown/x.{kind}").iterdir())
    assert written == [f"{name.replace('/', '%2F')}.md" for name in (names[0], names[3])]


def test_a_parquet_file_that_cannot_be_read_is_no_document(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.pdf").write_bytes(pdf(["one"]))
    (source / "x.parquet").write_bytes(b"PAR1, but damaged")
    run(job_of(source, output))
    write(source, output, documents=True)
    assert joined(output).keys() == {f"{source}/a.pdf"}


def test_documents_that_a_list_leads_to_are_joined_by_their_address(ran, tmp_path):
    source, _ = ran
    path, output = source / "list.txt", tmp_path / "of_list"
    addresses = ["sub/03.pdf", "e.png", "sub/../c.tif", "b.pdf", "sub/03.pdf"]
    path.write_text("\n".join(addresses))
    run(job_of(path, output))
    write(path, output, markdown=True)
    found = ds.dataset(output / "_vl01/documents", format="parquet").to_table().to_pylist()
    assert [(row["member"], row["page_count"], row["failed"]) for row in found] == [
        ("sub/03.pdf", 4, 0),
        ("sub/../c.tif", 2, 0),
        ("b.pdf", None, 1),
        ("sub/03.pdf#2", 4, 0),
    ]
    assert {row["source"] for row in found} == {str(path)}
    names = sorted(file.name for file in (output / "_vl01/markdown/list.txt").iterdir())
    assert names == ["sub%2F..%2Fc.tif.md", "sub%2F03.pdf%232.md", "sub%2F03.pdf.md"]
