"""Rows come in any order, twice or late: each is committed once, with the right status."""

from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import lease
from pipeline.commit import Committer
from pipeline.finish import finish
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.plan import Plan, ids_digest
from pipeline.sources import open_source
from schemas.errors import LedgerError
from schemas.ledger import CommitRecord
from schemas.rows import GENERATED, OUTPUT, with_kept
from tests.pipeline.fake_run import job_of, run, write_images


def id_of(unit: int, index: int) -> str:
    return f"{unit:016x}{index:016x}"


def rows(unit: int, *indices: int, of: int = 4, **columns) -> pa.Table:
    digest = ids_digest(id_of(unit, index) for index in range(of))
    table = [
        {
            "row_id": id_of(unit, index),
            "unit": unit,
            "index": index,
            "unit_rows": of if index == of - 1 else None,
            "unit_digest": digest if index == of - 1 else None,
            "source": "s",
            "text": f"text {unit} {index}",
            "finish_reason": "stop",
            "prompt_tokens": 10,
            "output_tokens": 2,
            **columns,
        }
        for index in indices
    ]
    return pa.Table.from_pylist(table, GENERATED)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)


@pytest.fixture
def committer(tmp_path):
    """Of a plan with three units."""
    write_images(tmp_path / "in", 12)
    job = job_of(tmp_path / "in", tmp_path / "out")
    ledger = Ledger(job.output)
    ledger.prepare()
    with Lease(ledger) as lease:
        ledger.create(job, {}, Plan(open_source(job.source), 4), lease.run)
        yield Committer(ledger, lease)


def texts(tmp_path, unit: int) -> list[str]:
    return pq.read_table(tmp_path / f"out/part-{unit:09}.parquet")["text"].to_pylist()


def recorded(tmp_path, unit: int) -> CommitRecord:
    name = f"out/_vl01/commits/{unit:09}.json"
    return CommitRecord.from_json((tmp_path / name).read_bytes(), name)


def test_a_unit_is_committed_when_its_last_row_came_whatever_the_order(tmp_path, committer):
    assert committer.add(rows(0, 3)) == []
    assert committer.add(pa.concat_tables([rows(1, 0, 2), rows(0, 1, 0)])) == []
    assert committer.incomplete() == {0: 3, 1: 2}
    (work,) = committer.add(rows(0, 2))
    record = recorded(tmp_path, 0)
    assert record.history() == (work,)
    assert (record.unit, record.rows, record.statuses) == (0, 4, {"ok": 4})
    assert (record.prompt_tokens, record.output_tokens) == (40, 8)
    assert texts(tmp_path, 0) == [f"text 0 {i}" for i in range(4)]
    assert committer.incomplete() == {1: 2}


def test_a_batch_that_is_done_twice_gives_its_rows_once(tmp_path, committer):
    committer.add(rows(0, 0, 1))
    committer.add(rows(0, 1, 0, text="again"))
    (work,) = committer.add(rows(0, 2, 3))
    assert work.rows == 4
    assert texts(tmp_path, 0) == [f"text 0 {i}" for i in range(4)]
    assert committer.add(rows(0, 0, 1, 2, 3, text="late")) == []
    assert texts(tmp_path, 0) == [f"text 0 {i}" for i in range(4)]
    assert committer.incomplete() == {}


def test_a_unit_of_two_readings_that_met_other_rows_is_not_committed(tmp_path, committer):
    """The worker died after two tables; the second time the first document had a page less."""
    committer.add(rows(0, 0, 1, of=5))
    rest = rows(0, 2, 3, unit_digest=ids_digest(id_of(0, index) for index in (0, 2, 3, 4)))
    assert committer.add(rest) == []
    assert committer.incomplete() == {0: 4}
    assert list((tmp_path / "out").glob("*.parquet")) == []


def test_several_units_can_become_whole_at_once(tmp_path, committer):
    table = pa.concat_tables([rows(unit, 0, 1, 2, 3) for unit in (2, 0, 1)])
    assert [work.rows for work in committer.add(table)] == [4, 4, 4]
    assert [recorded(tmp_path, unit).unit for unit in range(3)] == [0, 1, 2]


def test_columns_in_another_order_are_not_mixed_up(tmp_path, committer):
    table = rows(0, 0, 1, 2, 3)
    committer.add(table.select(table.column_names[::-1]))
    assert texts(tmp_path, 0) == [f"text 0 {i}" for i in range(4)]


def test_nothing_is_written_once_the_lease_is_lost(tmp_path, committer):
    (tmp_path / "out/_vl01/lease.json").unlink()
    with pytest.raises(LedgerError, match="lease"):
        committer.add(rows(0, 0, 1, 2, 3))
    assert list((tmp_path / "out").glob("*.parquet")) == []


def test_a_full_disk_stops_the_run_with_a_clear_line(committer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.output_folder.write_whole", full)
    with pytest.raises(LedgerError, match=r"cannot commit unit 0.*No space left"):
        committer.add(rows(0, 0, 1, 2, 3))


def test_a_storage_that_fails_before_a_commit_stops_the_run_with_a_clear_line(
    committer, monkeypatch
):
    def asleep(*_):
        raise RuntimeError("the storage is asleep")

    with monkeypatch.context() as now:
        now.setattr(Ledger, "read", asleep)
        with pytest.raises(LedgerError, match=r"cannot commit unit 0.*asleep"):
            committer.add(rows(0, 0, 1, 2, 3))


def test_the_record_counts_statuses_and_reasons(committer):
    committer.add(rows(0, 0, text=None, finish_reason=None, reason="timeout", message="30 s"))
    committer.add(rows(0, 1, finish_reason="length"))
    (record,) = committer.add(rows(0, 2, 3))
    assert record.statuses == {"failed": 1, "ok": 2, "truncated": 1}
    assert record.reasons == {"max_new_tokens": 1, "timeout": 1}


def test_kept_columns_of_any_type_are_carried_whole(tmp_path):
    columns = {
        "view": pa.array(["a", None], pa.string_view()),
        "raw": pa.array([b"a", None], pa.binary_view()),
        "nested": pa.array([{"a_view": {"b": [{"c": 1}]}}, None]),
        "pairs": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())),
        "names": pa.array([["a", "b"], []], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        "a name\nof two lines": pa.array([Decimal("1.50"), None], pa.decimal256(50, 2)),
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [b"a", b"b"], **columns}), tmp_path / "in/a.parquet")
    run(job_of(tmp_path / "in", tmp_path / "out", keep=tuple(columns)))
    (part,) = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(part)
    assert {name: table[name].to_pylist() for name in columns} == {
        name: column.to_pylist() for name, column in columns.items()
    }


# finish


def test_a_status_says_what_became_of_a_row():
    kept = pa.schema([("label", pa.string())])
    generated = with_kept(GENERATED, kept)
    table = pa.Table.from_pylist(
        [
            {"row_id": "a", "finish_reason": "stop", "text": "A", "label": "x"},
            {"row_id": "b", "finish_reason": "length", "text": "B"},
            {"row_id": "c", "reason": "decode_error", "message": "cut", "image_tokens": 3},
        ],
        generated,
    )
    done = finish(table)
    assert done.schema.equals(with_kept(OUTPUT, kept))
    assert done["status"].to_pylist() == ["ok", "truncated", "failed"]
    assert done["reason"].to_pylist() == [None, "max_new_tokens", "decode_error"]
    assert done["message"].to_pylist() == [None, None, "cut"]
    assert done["text"].to_pylist() == ["A", "B", None]
    assert done["image_tokens"].to_pylist() == [None, None, 3]
    assert done["label"].to_pylist() == ["x", None, None]


def test_a_row_without_answer_and_reason_is_not_passed_off_as_done():
    with pytest.raises(ValueError, match="row a has neither"):
        finish(pa.Table.from_pylist([{"row_id": "a"}], GENERATED))
