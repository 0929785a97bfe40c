"""The rows of lists of addresses: each line once, under its own name, with what it led to."""

import pickle
import tempfile
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.fetch import http
from pipeline.plan import Plan, planned_row_ids
from pipeline.read import ReadSettings, read_settings, read_unit
from pipeline.render.settings import PageSettings
from pipeline.sources import open_source
from pipeline.verify import verify
from schemas.errors import ConfigError
from schemas.job import Job
from schemas.ledger import UnitKind
from schemas.rows import INPUT, with_kept
from tests import http_server
from tests.documents import pdf, tiff
from tests.http_server import serve
from tests.images import good_images, page
from tests.pipeline import fake_run, test_retry


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def site():
    with serve({"/a.jpg": b"A", "/b.jpg": b"B"}) as found:
        yield found


def job_for(source, **keys) -> Job:
    keys = {"allow_host": ("127.0.0.1",), "host_rate": 1e4, "max_bytes": 1000} | keys
    return Job(source=str(source), output="out", model="model", prompt="?", **keys)


def plan_of(job: Job) -> Plan:
    return Plan(open_source(job.source), job.unit_rows, job.image_column, job.keep, job.uri_column)


def settings_of(job: Job) -> ReadSettings:
    return read_settings(job, open_source(job.source), PageSettings())


def read(source, units=None, **keys) -> list[dict]:
    """All rows of a source (or of some units of it), after checks that hold for any."""
    job = job_for(source, **keys)
    plan = plan_of(job)
    planned = list(plan.units())
    kept = plan.kept()
    settings = pickle.loads(pickle.dumps(replace(settings_of(job), kept=kept)))
    rows = []
    for unit in planned if units is None else units:
        tables = list(read_unit(unit, settings))
        assert all(table.schema.equals(with_kept(INPUT, kept)) for table in tables)
        found = pa.concat_tables(tables).to_pylist()
        assert [row["index"] for row in found] == list(range(len(found)))
        assert found[-1]["unit_rows"] == len(found)
        assert planned_row_ids(unit) in (None, [row["row_id"] for row in found])
        rows += found
    assert len({row["row_id"] for row in rows}) == len(rows)
    return rows


def outcomes(rows) -> list[tuple]:
    return [(row["member"], row["reason"] or row["data"]) for row in rows]


def test_each_line_is_a_row_whatever_it_leads_to(tmp_path, site):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/c.jpg").write_bytes(b"C")
    site.files["/long"] = bytes(1001)
    lines = [
        site.url("/a.jpg"),
        "photos/c.jpg",
        site.url("/gone.jpg"),
        f"file://{tmp_path}/photos/c.jpg",
        site.url("/a.jpg"),
        site.url("/long"),
        "photos/none.jpg",
        site.url("/a.jpg", "localhost").replace("localhost", "[::1]"),
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    rows = read(tmp_path / "list.txt", unit_rows=3)
    assert outcomes(rows) == [
        (lines[0], b"A"),
        (lines[1], b"C"),
        (lines[2], "not_found"),
        (lines[3], b"C"),
        (lines[0] + "#2", b"A"),
        (lines[5], "too_many_bytes"),
        (lines[6], "not_found"),
        (lines[7], "host_refused"),
    ]
    assert {row["source"] for row in rows} == {str(tmp_path / "list.txt")}


def test_rows_keep_their_ids_when_lines_are_appended(tmp_path, site):
    path = tmp_path / "list.txt"
    lines = [site.url("/a.jpg"), site.url("/b.jpg"), site.url("/a.jpg")]
    path.write_text("\n".join(lines))
    before = [row["row_id"] for row in read(path)]
    path.write_text("\n".join([*lines, lines[1], "new.jpg"]))
    assert [row["row_id"] for row in read(path)][:3] == before


def test_a_list_that_is_gone_since_it_was_planned_hurts_no_row(tmp_path, site):
    path = tmp_path / "list.csv"
    path.write_text(f"url,n\n{site.url('/a.jpg')},1\n{site.url('/b.jpg')},2\n")
    job = job_for(path, keep=("n",))
    plan = plan_of(job)
    (unit,) = plan.units()
    settings = replace(settings_of(job), kept=plan.kept())
    path.unlink()
    rows = pa.concat_tables(read_unit(unit, settings)).to_pylist()
    assert [(row["data"], row["n"]) for row in rows] == [(b"A", None), (b"B", None)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_columns_of_a_list_are_carried_over_as_text(tmp_path, site, kind):
    urls = [site.url("/a.jpg"), site.url("/b.jpg"), site.url("/none.jpg")]
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        path.write_text("id,url\n" + "".join(f"{i},{url}\n" for i, url in enumerate(urls)))
    else:
        path.write_text("".join(f'{{"id": {i}, "url": "{u}"}}\n' for i, u in enumerate(urls)))
    rows = read(path, keep=("id",), unit_rows=2)
    assert [(row["id"], row["data"]) for row in rows] == [("0", b"A"), ("1", b"B"), ("2", None)]
    with pytest.raises(ConfigError, match="cannot keep name"):
        read(path, keep=("name",))


def test_a_line_without_an_address_is_a_failed_row(tmp_path, site):
    (tmp_path / "list.jsonl").write_text(f'{{"url": "{site.url("/a.jpg")}"}}\n{{"url": nothing}}\n')
    first, second = read(tmp_path / "list.jsonl")
    assert first["data"] == b"A"
    assert (second["member"], second["reason"]) == ("#line 2", "bad_address")


def test_half_an_emoji_in_a_list_stops_no_run(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"A")
    first = r'{"url": "a.jpg", "caption": "cut \ud83d"}'
    second = r'{"url": "\ud83d", "caption": ["\ud83d"]}'
    (tmp_path / "list.jsonl").write_text(f"{first}\n{second}")
    rows = read(tmp_path / "list.jsonl", keep=("caption",))
    assert outcomes(rows) == [("a.jpg", b"A"), ("\\ud83d", "not_found")]
    assert [row["caption"] for row in rows] == ["cut \\ud83d", r'["\ud83d"]']


def test_a_parquet_column_of_addresses_is_read_instead_of_images(tmp_path, site):
    urls = [site.url("/a.jpg"), None, site.url("/b.jpg"), "", " ", site.url("/gone")] * 3
    table = pa.table({"image": [b"not this"] * 18, "link": urls, "n": range(18)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    rows = read(tmp_path, uri_column="link", keep=("n",), unit_rows=7)
    expected = [b"A", "missing_image", b"B", "missing_image", "missing_image", "not_found"] * 3
    assert outcomes(rows) == [(str(i), what) for i, what in enumerate(expected)]
    assert [row["n"] for row in rows] == list(range(18))
    dictionary = table.set_column(1, "link", pa.array(urls).dictionary_encode())
    pq.write_table(dictionary, tmp_path / "a.parquet")
    assert outcomes(read(tmp_path, uri_column="link")) == outcomes(rows)


def test_an_address_that_is_not_utf8_does_not_cost_the_rows_behind_it(tmp_path, site):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/c.jpg").write_bytes(b"C")
    addresses = pa.array([b"photos/c.jpg", b"\xff.jpg", b"photos/c.jpg"])
    links = pa.Array.from_buffers(pa.string(), 3, addresses.buffers())
    pq.write_table(pa.table({"link": links}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", uri_column="link")
    assert outcomes(rows) == [("0", b"C"), ("1", "not_found"), ("2", b"C")]


@pytest.mark.parametrize("column", ["n", "nobody"])
def test_a_parquet_column_that_holds_no_addresses_is_told_before_the_run(tmp_path, column):
    pq.write_table(pa.table({"image": [b"x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=f"no column '{column}' of type string"):
        read(tmp_path, uri_column=column)


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_a_retry_fetches_the_rows_it_is_for_and_no_others(tmp_path, site, kind):
    urls = [site.url("/a.jpg"), site.url("/c.jpg"), site.url("/b.jpg"), site.url("/d.jpg")]
    path = tmp_path / f"list.{kind}"
    if kind == "txt":
        path.write_text("\n".join(urls))
    else:
        pq.write_table(pa.table({"link": urls}), path)
    keys = {"uri_column": "link"} if kind == "parquet" else {}
    failed = {row["row_id"]: row["member"] for row in read(path, **keys) if row["reason"]}
    assert len(failed) == 2
    site.files |= {"/c.jpg": b"C", "/d.jpg": b"D"}
    site.asked.clear()
    job = job_for(path, **keys)
    (unit,) = plan_of(job).units()
    again = replace(unit.narrowed(failed.values()), only=frozenset(failed))
    tables = read_unit(again, settings_of(job))
    assert [row["data"] for row in pa.concat_tables(tables).to_pylist()] == [b"C", b"D"]
    assert sorted(path for path, _ in site.asked) == ["/c.jpg", "/d.jpg"]


def test_a_hostile_server_costs_its_own_rows(tmp_path, site):
    site.answers |= {"/drip": http_server.drip_body, "/flood": http_server.flood}
    site.answers["/inside"] = http_server.redirect("http://[::1]/")
    lines = ["/a.jpg", "/drip", "/flood", "/inside", "/b.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(site.url(line) for line in lines))
    rows = read(tmp_path / "list.txt", fetch_seconds=1.0)
    found = [outcome for _, outcome in outcomes(rows)]
    assert found == [b"A", "timeout", "too_many_bytes", "host_refused", b"B"]


def test_lists_are_read_only_where_source_names_them(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(b"J")
        (tmp_path / folder / "a.txt").write_text("a.jpg\n")

    def planned(source) -> list[tuple]:
        return [(unit.kind, unit.names) for unit in plan_of(job_for(source)).units()]

    images = [(UnitKind.IMAGES, ("x/a.jpg", "y/a.jpg"))]
    assert planned(tmp_path) == planned(tmp_path / "*" / "*") == images
    assert planned(tmp_path / "*" / "*.txt") == [
        (UnitKind.LIST, ("x/a.txt", "a.jpg")),
        (UnitKind.LIST, ("y/a.txt", "a.jpg")),
    ]
    assert planned(tmp_path / "x" / "a.txt") == [(UnitKind.LIST, ("a.txt", "a.jpg"))]


def test_a_list_without_a_single_line_is_told(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match="holds no address"):
        read(tmp_path / "list.txt")


def test_a_wrong_host_rule_is_told_before_the_run(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with pytest.raises(ConfigError, match="--allow-host is 'http://x'"):
        read(tmp_path / "list.txt", allow_host=("http://x",))


# Documents behind addresses


@pytest.fixture
def documents(site, tmp_path):
    """A list of five addresses, of which the names tell nothing, and where they lead."""
    site.files = {
        "/one": pdf(["first", "second"]),
        "/two": tiff([page(0, (40, 30)), page(1, (40, 30)), page(2, (40, 30))]),
        "/three": tiff([page(0, (40, 30))]),
        "/four": good_images(1)[0][1],
        "/five": pdf(["x"])[:200],
    }
    path = tmp_path / "list.txt"
    path.write_text("\n".join(site.url(name) for name in site.files))
    return path


def pages(rows, site) -> list[tuple]:
    prefix = site.url("")
    return [(row["member"].removeprefix(prefix), row["page"], row["reason"]) for row in rows]


EXPECTED = [
    ("/one", 1, None),
    ("/one", 2, None),
    ("/two", 1, None),
    ("/two", 2, None),
    ("/two", 3, None),
    ("/three", None, None),
    ("/four", None, None),
    ("/five", None, "source_damaged"),
]


def test_a_document_behind_an_address_is_a_row_for_each_page(documents, site):
    rows = read(documents, max_bytes=10**6)
    assert pages(rows, site) == EXPECTED
    assert all(row["data"].startswith(b"\x89PNG") for row in rows[:5])
    assert rows[5]["data"] == site.files["/three"]
    assert rows[6]["data"] == site.files["/four"]


def test_no_copy_of_a_document_is_left_behind(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    read(documents, max_bytes=10**6)
    assert not [path for path in (tmp_path / "copies").iterdir() if path.is_file()]


def test_what_an_address_names_as_an_image_is_counted_and_read_as_one(tmp_path, site):
    site.files |= {"/a.jpg?w=1": pdf(["x"]), "/b": b"B"}
    (tmp_path / "list.txt").write_text(f"{site.url('/a.jpg?w=1')}\n{site.url('/a.jpg')}#top")
    (unit,) = plan_of(job_for(tmp_path / "list.txt")).units()
    assert unit.rows == 2
    first, _ = read(tmp_path / "list.txt", max_bytes=10**6)
    assert (first["page"], first["data"]) == (None, site.files["/a.jpg?w=1"])
    (tmp_path / "list.txt").write_text(f"{site.url('/a.jpg')}\n{site.url('/b')}")
    (unit,) = plan_of(job_for(tmp_path / "list.txt")).units()
    assert unit.rows is None


def test_a_retry_asks_again_for_the_documents_that_failed_and_no_other(documents, site, tmp_path):
    """Two could not be had: one is gone, one broken. Both are there now; others may not be."""
    mended = pdf(["x", "y", "z"])
    files, site.files = site.files, {**site.files}
    del site.files["/two"]
    job = fake_run.job_of(
        documents, tmp_path / "out", allow_host=["127.0.0.1"], max_bytes=10**6, host_rate=1e4
    )
    fake_run.run(job)
    before = test_retry.rows(tmp_path / "out")
    assert Counter(row["reason"] for row in before.values()) == Counter(
        {None: 4, "not_found": 1, "source_damaged": 1}
    )
    site.files = files | {"/five": mended}
    site.asked.clear()
    summary = test_retry.retry(documents, tmp_path / "out", max_bytes=10**6)
    assert sorted(path for path, _ in site.asked) == ["/five", "/two"]
    assert (summary.again, summary.added, summary.rows) == (2, 6, {"ok": 6})
    after = test_retry.rows(tmp_path / "out")
    assert {row_id for row_id, row in before.items() if row["status"] == "ok"} < after.keys()
    found = sorted(pages(after.values(), site), key=str)
    again = [*EXPECTED[:-1], *(("/five", page, None) for page in (1, 2, 3))]
    assert found == sorted(again, key=str)
    assert verify(str(tmp_path / "out")).ok


def test_a_retry_of_one_page_asks_for_its_document_alone(documents, site, tmp_path):
    job = job_for(documents, max_bytes=10**6)
    (unit,) = plan_of(job).units()
    rows = read(documents, max_bytes=10**6)
    page_3 = rows[4]
    site.asked.clear()
    again = replace(unit, only=frozenset([page_3["row_id"]])).narrowed({page_3["member"]})
    (found,) = pa.concat_tables(read_unit(again, settings_of(job))).to_pylist()
    assert (found["row_id"], found["data"]) == (page_3["row_id"], page_3["data"])
    assert [path for path, _ in site.asked] == ["/two"]
