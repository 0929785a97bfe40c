"""Whatever is lost, doubled or changed in OUT, `verify` finds it."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import lease
from pipeline.commit import part_bytes
from pipeline.ledger import Ledger
from pipeline.plan import row_id
from pipeline.verify import verify
from schemas.errors import ConfigError
from schemas.ledger import CommitRecord
from tests.pipeline.fake_run import job_of, run, write_images
from tests.pipeline.test_read import tar_of


@pytest.fixture(autouse=True)
def no_settling(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    """Units 0 and 1: images; 2: a tar of five; 3: the last images; 4: ten Parquet rows."""
    write_images(tmp_path / "in", 10)
    (tmp_path / "in/0007a.tar").write_bytes(tar_of({f"{i}.jpg": b"t" for i in range(5)}))
    pq.write_table(pa.table({"image": [b"p"] * 10}), tmp_path / "in/z.parquet")
    return run(job_of(tmp_path / "in", tmp_path / "out"))


def rewrite(ledger: Ledger, unit: int, change, keep_record: bool = False) -> None:
    """Replaces a part, and makes its record agree with it unless told not to."""
    record = ledger.record(unit)
    data = part_bytes(change(pq.read_table(ledger.part_path(unit))), {})
    if keep_record:
        ledger.fs.pipe_file(ledger.part_path(unit), data)
        return
    rows = pq.read_table(pa.BufferReader(data)).num_rows
    fields = {**vars(record), "rows": rows, "size": len(data), "statuses": {"ok": rows}}
    ledger.commit(CommitRecord(**fields), data)


def test_a_whole_dataset_is_found_whole(ledger):
    found = verify(ledger.output, deep=True)
    assert found.ok
    assert (found.planned_units, found.committed_units, found.pending_units) == (5, 5, 0)
    assert (found.rows, found.statuses, found.reasons) == (25, {"ok": 25}, {})
    assert found.problems == ()


@pytest.mark.parametrize("damaged", ["part-000000001.parquet", "_vl01/commits/000000001.json"])
def test_a_damaged_unit_is_done_again_once_its_record_is_deleted(ledger, tmp_path, damaged):
    (tmp_path / "out" / damaged).write_bytes(b"cut")
    assert verify(ledger.output).damaged_units == 1
    ledger.remove("commits/000000001.json")
    run(job_of(tmp_path / "in", tmp_path / "out"))
    assert verify(ledger.output, deep=True).ok


def test_an_unfinished_run_says_how_many_units_are_pending(ledger):
    ledger.remove("commits/000000001.json")
    ledger.fs.rm_file(ledger.part_path(1))
    found = verify(ledger.output)
    assert not found.ok
    assert found.pending_units == 1
    assert found.problems == ()


def test_a_part_without_a_record_is_told(ledger):
    ledger.remove("commits/000000001.json")
    found = verify(ledger.output)
    assert found.unrecorded_parts == ("part-000000001.parquet",)
    assert not found.ok


def test_a_part_beyond_the_plan_is_told(ledger):
    shutil.copy(ledger.part_path(0), ledger.part_path(99))
    assert verify(ledger.output).unrecorded_parts == ("part-000000099.parquet",)


def test_rows_that_a_reader_of_out_sees_and_no_run_wrote_are_told(ledger):
    shutil.copy(ledger.part_path(0), f"{ledger.root}/copy of part-000000000.parquet")
    found = verify(ledger.output)
    assert "copy of part-000000000.parquet is of no run" in found.problems[0]
    assert not found.ok


def test_a_part_that_is_gone_is_missing_rows(ledger):
    ledger.fs.rm_file(ledger.part_path(4))
    found = verify(ledger.output)
    assert (found.missing_rows, found.damaged_units) == (10, 1)
    assert "unit 4" in found.problems[0]
    assert not found.ok


@pytest.mark.parametrize("unit", [0, 4])
def test_a_row_that_was_lost_is_found_missing(ledger, unit):
    rewrite(ledger, unit, lambda rows: rows.slice(1))
    found = verify(ledger.output)
    assert found.missing_rows == 1
    assert not found.ok
    assert "1 missing" in found.problems[0]


def test_a_row_of_another_unit_is_found_where_it_does_not_belong(ledger):
    rewrite(ledger, 1, lambda _: pq.read_table(ledger.part_path(0)))
    found = verify(ledger.output)
    assert (found.missing_rows, found.doubled_rows) == (4, 4)
    assert "4 that were not planned" in found.problems[0]
    assert any(row_id("0000.jpg") in line and "[0, 1]" in line for line in found.problems)


@pytest.mark.parametrize("unit", [0, 2, 4])
def test_a_row_that_is_there_twice_is_found(ledger, unit):
    rewrite(ledger, unit, lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]))
    found = verify(ledger.output)
    assert found.doubled_rows == 1
    assert not found.ok


def test_a_part_that_does_not_agree_with_its_record_is_found(ledger):
    rewrite(ledger, 2, lambda rows: rows.slice(1), keep_record=True)
    found = verify(ledger.output)
    assert not found.ok
    assert "its record says" in found.problems[0]


def test_a_changed_byte_is_found_by_the_deep_look(ledger):
    path = ledger.part_path(0)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.seek(40)
        byte = file.read(1)
        file.seek(40)
        file.write(bytes([byte[0] ^ 1]))
    found = verify(ledger.output, deep=True)
    assert not found.ok
    assert "sha256" in found.problems[0]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"unit": 1}'])
def test_a_damaged_record_is_told_and_the_others_still_checked(ledger, damage):
    ledger.write("commits/000000001.json", damage)
    ledger.fs.rm_file(ledger.part_path(4))
    found = verify(ledger.output)
    assert found.damaged_units == 2
    assert "not a commit record" in found.problems[0]


def test_leftovers_of_a_crash_are_not_taken_for_rows(ledger):
    ledger.fs.pipe_file(f"{ledger.root}/_vl01/tmp/left-over", b"half a part")
    assert verify(ledger.output).ok


def test_a_folder_that_is_no_dataset_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="no dataset"):
        verify(str(tmp_path))
