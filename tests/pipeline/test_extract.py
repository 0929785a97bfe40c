"""The typed columns of an extraction: queried as they are, kept by retries, seen in the report."""

import json
from datetime import date
from decimal import Decimal
from pathlib import Path

import duckdb
import pandas
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline import lease
from pipeline.ledger import Ledger
from pipeline.report import write_report
from pipeline.retry import Choice
from pipeline.verify import verify
from schemas.errors import ConfigError
from schemas.rows import OUTPUT
from tests.pipeline.fake_run import job_of, run
from tests.pipeline.test_retry import retry

LINE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "price": {"type": "number", "multipleOf": 0.01},
    },
    "required": ["name", "price"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "total": {"type": ["number", "null"], "multipleOf": 0.01},
        "day": {"type": "string", "format": "date"},
        "seller": {"type": "object", "properties": {"city": {"type": ["string", "null"]}}},
        "lines": {"type": "array", "items": LINE},
        "paid": {"type": "boolean"},
    },
    "required": ["total", "day", "lines"],
}
ANSWERS = {
    "a.jpg": '{"total":12.10,"day":"2024-02-29","seller":{"city":"Köln"},'
    '"lines":[{"name":"tea","price":2.1},{"name":"cup","price":10}],"paid":true}',
    "b.jpg": '{"total":null,"day":"1999-12-31","lines":[]}',
    "c.jpg": '{"total":0.30,"day":"2024-01-01","seller":{"city":null},"lines":[],"paid":false}',
    "d.jpg": '{"total":1,"day":"2024-02-30","lines":[]}',
    "e.jpg": '{"total":1,',
    "f.jpg": "x" * 2000,  # larger than max_bytes
}


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)


def extraction(tmp_path: Path, answers=ANSWERS, **keys) -> Path:
    """The dataset of images that are their own answers."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir(exist_ok=True)
    for name, answer in answers.items():
        (source / name).write_text(answer)
    job = {"task": "extract", "schema": json.dumps(SCHEMA), "max_bytes": 1000, **keys}
    run(job_of(source, output, **job))
    return output


def query(output: Path, what: str, rest: str = "") -> list[tuple]:
    return duckdb.execute(f"select {what} from '{output}/part-*.parquet' {rest}").fetchall()


def test_every_row_has_its_status_and_only_good_answers_have_data(tmp_path):
    rows = ds.dataset(extraction(tmp_path)).to_table().sort_by("source").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["invalid"] * 2 + ["failed"]
    reasons = ["schema_mismatch", "invalid_json", "too_many_bytes"]
    assert [row["reason"] for row in rows] == [None, None, None, *reasons]
    assert rows[3]["message"] == 'day is "2024-02-30"; expected a date of the calendar'
    assert [row["data"] is None for row in rows] == [False] * 3 + [True] * 3
    assert [row["confidence"] is None for row in rows] == [False] * 3 + [True] * 3
    assert [row["text"] for row in rows] == [*list(ANSWERS.values())[:5], None]
    assert verify(str(tmp_path / "out"), deep=True).ok


def test_the_columns_stand_where_they_are_looked_for(tmp_path):
    names = ds.dataset(extraction(tmp_path)).schema.names
    assert names[names.index("text") + 1] == "data"
    assert names[names.index("mean_logprob") + 1] == "confidence"
    assert [name for name in names if name not in ("data", "confidence")] == OUTPUT.names


def test_duckdb_queries_fields_lists_dates_and_decimals_directly(tmp_path):
    output = extraction(tmp_path)
    assert query(output, "sum(data.total)") == [(Decimal("12.40"),)]
    assert query(output, "typeof(data.total), typeof(data.day)", "limit 1") == [
        ("DECIMAL(17,2)", "DATE")
    ]
    assert query(output, "data.seller.city", "where data.day = '2024-02-29'") == [("Köln",)]
    lines = query(output, "unnest(data.lines, recursive := true)", "where data.paid")
    assert lines == [("tea", Decimal("2.10")), ("cup", Decimal("10.00"))]
    assert query(output, "count(*)", "where data.total is null and status = 'ok'") == [(1,)]
    assert query(output, "count(*)", "where data is null") == [(3,)]
    sure = query(output, "confidence.total, confidence.lines[1].price", "where data.total > 1")
    assert sure == [(pytest.approx(0.5), pytest.approx(0.5))]


def test_pandas_reads_fields_lists_dates_and_decimals(tmp_path):
    frame = pandas.read_parquet(extraction(tmp_path)).sort_values("source").set_index("source")
    first = frame["data"].iloc[0]
    assert first["total"] == Decimal("12.10")
    assert first["day"] == date(2024, 2, 29)
    assert [line["name"] for line in first["lines"]] == ["tea", "cup"]
    assert frame["data"].isna().tolist() == [False] * 3 + [True] * 3
    typed = pandas.read_parquet(tmp_path / "out", dtype_backend="pyarrow").sort_values("source")
    totals = typed["data"].struct.field("total")
    assert totals.dropna().tolist() == [Decimal("12.10"), Decimal("0.30")]
    assert typed["confidence"].struct.field("day").iloc[1] == pytest.approx(0.5)


def test_kept_columns_stand_beside_the_fields(tmp_path):
    (tmp_path / "in").mkdir()
    images = [answer.encode() for answer in ANSWERS.values()]
    table = {"image": images, "fields": list(ANSWERS)}
    pq.write_table(pa.table(table), tmp_path / "in" / "a.parquet")
    output = extraction(tmp_path, {}, keep=("fields",))
    found = query(output, "fields, data.total", "where data.total is not null order by 1")
    assert found == [("a.jpg", Decimal("12.10")), ("c.jpg", Decimal("0.30"))]


def test_a_retry_puts_fields_in_place_and_loses_none(tmp_path):
    output = extraction(tmp_path)
    mended = '{"total":1,"day":"2024-02-29","lines":[]}'
    (tmp_path / "in" / "d.jpg").write_text(mended)
    (tmp_path / "in" / "f.jpg").write_text(mended)
    summary = retry(tmp_path / "in", output, Choice(frozenset({"invalid", "failed"})))
    assert summary.rows == {"ok": 2, "invalid": 1}
    assert query(output, "sum(data.total)") == [(Decimal("14.40"),)]
    assert query(output, "count(data), count(confidence)") == [(5, 5)]
    assert verify(str(output), deep=True).ok


def test_an_invalid_answer_does_not_replace_a_good_one_but_a_failure(tmp_path):
    output = extraction(tmp_path)
    for name in ("e.jpg", "f.jpg"):
        (tmp_path / "in" / name).write_text("no JSON")
    summary = retry(tmp_path / "in", output, Choice(frozenset({"invalid", "failed"})))
    assert summary.rows == {"invalid": 3}
    assert query(output, "text", "where source like '%f.jpg'") == [("no JSON",)]


def test_a_dataset_says_by_which_schema_it_was_made_and_refuses_another(tmp_path):
    output = extraction(tmp_path)
    (part, *_) = output.glob("part-*.parquet")
    metadata = pq.read_schema(part).metadata
    assert json.loads(json.loads(metadata[b"vl01.fingerprint"])["schema"]) == SCHEMA
    stored = Ledger(str(output))
    assert stored.resume()
    assert json.loads(stored.job["job"]["schema"]) == SCHEMA
    other = SCHEMA | {"required": ["total"]}
    with pytest.raises(ConfigError, match="rows of another job: schema is"):
        extraction(tmp_path, schema=json.dumps(other))


def test_the_report_shows_the_fields_beside_the_page(tmp_path):
    output = extraction(tmp_path)
    report = write_report(str(output)).report
    page = (output / "_vl01" / "report.html").read_text()
    assert report.statuses == {"ok": 3, "invalid": 2, "failed": 1}
    assert '<td class="muted">lines[1].price</td><td>10.00</td>' in page
    assert '<td class="muted">day</td><td>2024-02-29</td>' in page
    assert "<b>schema_mismatch</b>" in page
