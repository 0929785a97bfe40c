"""Rows that failed are done again: no success is lost, no row comes twice, whenever it crashes."""

import hashlib
import itertools
import os
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline import lease, storage
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.plan import row_id, units_of
from pipeline.read import ReadSettings, read_settings, read_units
from pipeline.render.settings import PageSettings
from pipeline.replacer import Replacer, RetrySummary, merge
from pipeline.retry import Choice, chosen
from pipeline.sources import open_source
from pipeline.verify import verify
from schemas.errors import LedgerError
from schemas.extraction import load_schema
from schemas.job import Job
from schemas.ledger import Unit, UnitKind
from schemas.rows import OUTPUT
from tests.pipeline.fake_run import generated, job_of, run, write_images
from tests.pipeline.test_ledger import Crash, crash_at
from tests.pipeline.test_read import tar_of

FAILED = Choice(frozenset({"failed"}))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)


def retry(
    source, output, choice: Choice = FAILED, max_bytes: int = 1000, changed: dict | None = None
) -> RetrySummary:
    """What pipeline.retry does around the flow, with the flow of fake_run; attempts are 1."""
    ledger = Ledger(str(output))
    ledger.prepare()
    with Lease(ledger) as held:
        assert ledger.resume()
        ledger.clean_up()
        units = chosen(ledger, choice)
        replacer = Replacer(ledger, held, units, changed)
        schema = ledger.job["job"]["schema"]
        asked = schema and load_schema(schema)
        job = Job.model_validate(ledger.job["job"] | {"max_bytes": max_bytes})
        settings = read_settings(job, open_source(str(source)), PageSettings())
        settings = replace(settings, kept=ledger.kept)
        for rows in read_units(units, settings):
            answers = generated(rows, asked)
            tried = [int(answer is not None) for answer in answers["text"].to_pylist()]
            at = answers.column_names.index("attempts")
            replacer.add(answers.set_column(at, "attempts", pa.array(tried, pa.int32())))
        assert replacer.left == 0
    return replacer.summary(0.0)


def rows(output) -> dict[str, dict]:
    """By row id, each once."""
    found = pyarrow.dataset.dataset(str(output)).to_table().to_pylist()
    by_id = {row["row_id"]: row for row in found}
    assert len(by_id) == len(found)
    return by_id


def digests(output: Path) -> dict[str, tuple[str, int]]:
    return {
        p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in output.glob("part-*")
    }


def damage(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"{number:04}.jpg").write_bytes(b"x" * 1001)


def first_run(tmp_path: Path, count: int, bad: list[int], **keys) -> tuple[Path, Path]:
    source, output = tmp_path / "in", tmp_path / "out"
    write_images(source, count)
    damage(source, *bad)
    run(job_of(source, output, max_bytes=1000, **keys))
    return source, output


# What is done again, and what becomes of it


def test_of_30_failures_the_20_that_can_succeed_now_do_and_no_other_unit_is_touched(tmp_path):
    bad = list(range(0, 60, 2))
    source, output = first_run(tmp_path, 100, bad)
    before, parts = rows(output), digests(output)
    for number in bad[:20]:
        (source / f"{number:04}.jpg").write_bytes(b"mended %d" % number)
    summary = retry(source, output)

    assert (summary.again, summary.added) == (30, 0)
    assert summary.rows == {"ok": 20, "failed": 10}
    assert summary.reasons == {"too_many_bytes": 10}
    after = rows(output)
    assert after.keys() == before.keys()
    for number in range(100):
        row, old = (there[row_id(f"{number:04}.jpg")] for there in (after, before))
        if number in bad[:20]:
            assert (row["status"], row["text"]) == ("ok", f"mended {number}")
            assert row["reason"] is row["message"] is None
            assert row["attempts"] == 1
        elif number in bad:
            assert row["status"] == "failed"
        else:
            assert row == old
    # Units 0 to 9 were mended; 10 to 14 failed as before, 15 to 24 had no failure.
    changed = [name for name, digest in digests(output).items() if digest != parts[name]]
    assert {f"part-{unit:09}.parquet" for unit in range(10)} <= set(changed)
    assert not {f"part-{unit:09}.parquet" for unit in range(15, 25)} & set(changed)
    found = verify(str(output), deep=True)
    assert found.ok
    assert found.statuses == {"ok": 90, "failed": 10}


def test_only_rows_with_the_reason_that_was_asked_for_are_done_again(tmp_path):
    source, output = first_run(tmp_path, 8, [1])
    (source / "0002.jpg").unlink()
    shutil.rmtree(output)
    job = job_of(source, output, max_bytes=1000)
    (source / "0002.jpg").symlink_to("/nowhere")
    run(job)
    assert Counter(row["reason"] for row in rows(output).values()) == {
        None: 6,
        "too_many_bytes": 1,
        "not_found": 1,
    }
    write_images(source, 2)
    (source / "0002.jpg").unlink()
    (source / "0002.jpg").write_bytes(b"back")
    summary = retry(source, output, Choice(frozenset({"failed"}), frozenset({"not_found"})))
    assert summary.rows == {"ok": 1}
    assert rows(output)[row_id("0001.jpg")]["reason"] == "too_many_bytes"
    assert rows(output)[row_id("0002.jpg")]["text"] == "back"


def test_a_row_that_fails_once_more_has_the_newest_reason(tmp_path):
    source, output = first_run(tmp_path, 4, [1])
    (source / "0001.jpg").unlink()
    assert retry(source, output).reasons == {"not_found": 1}
    row = rows(output)[row_id("0001.jpg")]
    assert (row["status"], row["reason"]) == ("failed", "not_found")
    assert verify(str(output), deep=True).reasons == {"not_found": 1}


def test_a_dataset_without_such_rows_is_left_alone(tmp_path):
    source, output = first_run(tmp_path, 8, [])
    parts = digests(output)
    assert retry(source, output) == RetrySummary(str(output), units=0, planned_units=2)
    assert digests(output) == parts


def test_a_unit_that_is_not_done_yet_is_left_to_the_run(tmp_path):
    source, output = first_run(tmp_path, 8, [1, 5])
    ledger = Ledger(str(output))
    ledger.resume()
    ledger.remove("commits/000000001.json")
    write_images(source, 8)
    done = retry(source, output)
    assert (done.rows, done.unfinished_units, done.planned_units) == ({"ok": 1}, 1, 2)
    assert len(rows(output)) == 4
    run(job_of(source, output, max_bytes=1000))
    assert {row["status"] for row in rows(output).values()} == {"ok"}


def test_the_rows_of_a_parquet_file_are_done_again_by_their_number(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()

    def write(images):
        pq.write_table(pa.table({"image": images, "id": range(10)}), source / "a.parquet")

    write([b"p%d" % i if i % 3 else None for i in range(10)])
    run(job_of(source, output, keep=("id",)))
    assert retry(source, output).rows == {"failed": 4}
    write([b"p%d" % i if i != 6 else None for i in range(10)])
    assert retry(source, output).rows == {"ok": 3, "failed": 1}
    found = sorted(rows(output).values(), key=lambda row: row["id"])
    assert [row["text"] for row in found] == [f"p{i}" if i != 6 else None for i in range(10)]
    (source / "a.parquet").write_bytes(b"gone bad")
    (source / "b.jpg").write_bytes(b"b")
    assert retry(source, output).reasons == {"source_damaged": 1}
    assert [row["id"] for row in rows(output).values() if row["status"] == "failed"] == [6]


def test_kept_columns_stay_when_the_list_was_changed_before_the_retry(tmp_path):
    """A list is read again at the place where the row was; its lines may have moved since."""
    source, output = tmp_path / "list.csv", tmp_path / "out"
    lines = [f"{tmp_path}/{name}.jpg,{name}" for name in "abc"]
    source.write_text("\n".join(["url,id", *lines]))
    (tmp_path / "a.jpg").write_bytes(b"image")
    run(job_of(source, output, keep=("id",)))
    for name in "bc":
        (tmp_path / f"{name}.jpg").write_bytes(b"image")
    source.write_text("\n".join(["url,id", "http://x/new.jpg,new", *lines]))
    assert retry(source, output).rows == {"ok": 2}
    assert {row["id"]: row["text"] for row in rows(output).values()} == dict.fromkeys(
        "abc", "image"
    )


def test_a_member_of_a_tar_is_done_again_without_the_others(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    members = {f"{i}.jpg": b"t%d" % i for i in range(5)}
    (source / "a.tar").write_bytes(tar_of({**members, "3.jpg": b"x" * 1001}))
    run(job_of(source, output, max_bytes=1000))
    (source / "a.tar").write_bytes(tar_of({name: data + b"!" for name, data in members.items()}))
    summary = retry(source, output)
    assert (summary.again, summary.rows) == (1, {"ok": 1})
    texts = [row["text"] for row in rows(output).values()]
    assert texts == ["t0", "t1", "t2", "t3!", "t4"]


def test_the_rows_behind_the_cut_of_a_tar_come_when_it_is_whole(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    whole = tar_of({f"{i}.jpg": b"t%d" % i for i in range(5)})
    (source / "a.tar").write_bytes(whole[: 1024 * 2 + 512])
    run(job_of(source, output))
    assert [row["status"] for row in rows(output).values()] == ["ok", "ok", "failed"]
    (source / "a.tar").write_bytes(whole[: 1024 * 3 + 512])
    summary = retry(source, output)
    assert (summary.again, summary.added, summary.rows) == (1, 1, {"ok": 1, "failed": 1})
    (source / "a.tar").write_bytes(whole)
    summary = retry(source, output)
    assert (summary.again, summary.added, summary.rows) == (1, 2, {"ok": 2})
    assert [row["text"] for row in rows(output).values()] == [f"t{i}" for i in range(5)]
    found = verify(str(output), deep=True)
    assert found.ok
    assert found.rows == 5


def test_a_member_that_a_tar_has_lost_is_a_failed_row_that_says_so(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.tar").write_bytes(tar_of({"a.jpg": b"a", "b.jpg": b"x" * 1001}))
    run(job_of(source, output, max_bytes=1000))
    before = rows(output)
    tarfile.open(source / "a.tar", "w").close()
    assert retry(source, output).reasons == {"not_found": 1}
    after = rows(output)
    lost = row_id("a.tar", "b.jpg")
    assert after.pop(lost)["reason"] == "not_found"
    assert before.pop(lost)["reason"] == "too_many_bytes"
    assert after == before


# Which of two outcomes stays


def verdict(outcomes: list[str]) -> dict[str, list]:
    """Rows named a, b, ... of these statuses or reasons."""
    truncated, invalid = ("max_new_tokens", "repetition"), ("invalid_json", "schema_mismatch")
    statuses = dict.fromkeys(truncated, "truncated") | dict.fromkeys(invalid, "invalid")
    return {
        "row_id": list("ab"[: len(outcomes)]),
        "status": [statuses.get(outcome, outcome) for outcome in outcomes],
        "reason": [outcome if outcome in statuses else None for outcome in outcomes],
    }


def output_rows(**columns: list) -> pa.Table:
    ids = columns["row_id"]
    table = {name: columns.get(name, [None] * len(ids)) for name in OUTPUT.names}
    return pa.table(table, OUTPUT)


@pytest.mark.parametrize(
    ("old", "new", "stays"),
    [
        ("failed", "failed", "new"),
        ("failed", "ok", "new"),
        ("failed", "repetition", "new"),
        ("repetition", "failed", "old"),
        ("repetition", "repetition", "new"),
        ("repetition", "max_new_tokens", "new"),
        ("max_new_tokens", "failed", "old"),
        ("max_new_tokens", "repetition", "old"),
        ("max_new_tokens", "max_new_tokens", "new"),
        ("max_new_tokens", "invalid_json", "new"),
        ("max_new_tokens", "ok", "new"),
        ("invalid_json", "failed", "old"),
        ("invalid_json", "max_new_tokens", "old"),
        ("invalid_json", "schema_mismatch", "new"),
        ("schema_mismatch", "ok", "new"),
        ("ok", "failed", "old"),
    ],
)
def test_no_answer_is_replaced_by_a_worse_one_and_attempts_add_up(old, new, stays):
    """As the ladder judges them while they are written: cut is worse than broken."""
    before = output_rows(**verdict([old, "ok"]), text=["old", "b"], attempts=[2, 1])
    after = output_rows(**verdict([new]), text=["new"], attempts=[1])
    merged = merge(before, after, Unit(0, UnitKind.IMAGES, ("a",), only=frozenset("a")), [])
    assert merged.schema.equals(OUTPUT)
    assert merged["row_id"].to_pylist() == ["a", "b"]
    assert merged["text"].to_pylist() == [stays, "b"]
    assert merged["attempts"].to_pylist() == [3, 1]


@pytest.mark.parametrize(("tokens", "stays"), [(255, "old"), (256, "new"), (512, "new")])
def test_of_two_answers_that_were_cut_the_longer_one_stays(tokens, stays):
    cut = verdict(["max_new_tokens"])
    before = output_rows(**cut, text=["old"], attempts=[1], output_tokens=[256])
    after = output_rows(**cut, text=["new"], attempts=[1], output_tokens=[tokens])
    merged = merge(before, after, Unit(0, UnitKind.IMAGES, ("a",), only=frozenset("a")), [])
    assert merged["text"].to_pylist() == [stays]


def test_an_answer_without_a_word_does_not_replace_a_text():
    before = output_rows(**verdict(["repetition"]), text=["old"], attempts=[1])
    after = output_rows(**verdict(["ok"]), text=[" - "], attempts=[1])
    merged = merge(before, after, Unit(0, UnitKind.IMAGES, ("a",), only=frozenset("a")), [])
    assert merged["text"].to_pylist() == ["old"]


def test_what_was_asked_otherwise_says_so(tmp_path):
    source, output = first_run(tmp_path, 8, [1, 5])
    (source / "0001.jpg").write_bytes(b"mended")
    retry(source, output, changed={"max_new_tokens": 1024, "temperature": 0.4})
    messages = {row["text"]: row["message"] for row in rows(output).values()}
    assert messages.pop("mended") == "asked again with max_new_tokens 1024, temperature 0.4"
    assert "bytes" in messages.pop(None)  # it was not asked
    assert set(messages.values()) == {None}


def test_a_row_that_was_not_asked_for_stays_whatever_came(tmp_path):
    before = output_rows(row_id=["a", "b"], status=["ok", "failed"], text=["old", None])
    after = output_rows(row_id=["a", "b", "c"], status=["ok"] * 3, text=["new"] * 3)
    merged = merge(before, after, Unit(0, UnitKind.TAR, ("t",), only=frozenset("b")), [])
    assert merged["text"].to_pylist() == ["old", "new"]


# Crashes


def test_a_crash_at_any_write_leaves_each_unit_with_one_true_part(tmp_path):
    """At every moment a reader sees each row once, `verify` finds the dataset whole, and the next
    retry ends where one that was not disturbed would have."""
    source, _ = first_run(tmp_path, 12, [1, 5, 9])
    write_images(source, 12)
    crashes, interrupted = 0, 0
    for moment in itertools.count():
        output = tmp_path / f"out-{moment}"
        shutil.copytree(tmp_path / "out", output)
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_at(monkeypatch, moment)
            try:
                retry(source, output)
                break
            except Crash:
                crashes += 1
        found = verify(str(output), deep=True)
        assert found.ok, found.problems
        assert Counter(row["status"] for row in rows(output).values()) == found.statuses
        left = list((output / "_vl01").glob("replacing/*.json"))
        interrupted += len(left)
        retry(source, output)
        assert {row["status"] for row in rows(output).values()} == {"ok"}
        assert verify(str(output), deep=True).statuses == {"ok": 12}
        assert list((output / "_vl01/replacing").iterdir()) == []
        assert list((output / "_vl01/tmp").iterdir()) == []
    assert crashes >= 2 * 3 * 3  # before and after: new record, part, record, of three units
    assert interrupted >= 3 * 3


def test_the_next_run_settles_a_retry_that_was_cut_short(tmp_path, monkeypatch):
    source, output = first_run(tmp_path, 8, [1])
    write_images(source, 8)
    ledger = Ledger(str(output))
    replace = os.replace

    def dying_replace(a, b):
        if "commits" in str(b):
            raise Crash
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        with pytest.raises(Crash):
            retry(source, output)
    ledger.resume()
    assert ledger.record(0).statuses == {"ok": 3, "failed": 1}
    run(job_of(source, output, max_bytes=1000))
    assert ledger.record(0).statuses == {"ok": 4}
    assert list((output / "_vl01/replacing").iterdir()) == []


def test_a_part_that_was_changed_by_others_stops_the_retry(tmp_path):
    source, output = first_run(tmp_path, 4, [1])
    part = output / "part-000000000.parquet"
    pq.write_table(pq.read_table(part).slice(1), part)
    with pytest.raises(LedgerError, match=r"part-000000000\.parquet.*not what was committed"):
        retry(source, output)


def test_nothing_is_replaced_once_the_lease_is_lost(tmp_path):
    source, output = first_run(tmp_path, 4, [1])
    write_images(source, 4)
    parts = digests(output)
    ledger = Ledger(str(output))
    with Lease(ledger) as held:
        ledger.resume()
        units = chosen(ledger, FAILED)
        replacer = Replacer(ledger, held, units)
        ledger.remove("lease.json")
        settings = ReadSettings(open_source(str(source)), 1000)
        (table,) = read_units(units, settings)
        with pytest.raises(LedgerError, match="lease"):
            replacer.add(generated(table))
    assert digests(output) == parts


def test_only_the_rows_to_do_again_are_read(tmp_path, monkeypatch):
    source, output = first_run(tmp_path, 12, [1, 5, 6])
    ledger = Ledger(str(output))
    ledger.resume()
    units = chosen(ledger, FAILED)
    assert [(unit.number, len(unit.only or ())) for unit in units_of(units)] == [(0, 1), (1, 2)]
    opened = []
    monkeypatch.setattr(
        "pipeline.formats.images.read_file", lambda _, name: opened.append(name) or b""
    )
    settings = ReadSettings(open_source(str(source)), 1000)
    for table in read_units(units, settings):
        assert table["unit_rows"].to_pylist()[-1] == table.num_rows
    assert opened == ["0001.jpg", "0005.jpg", "0006.jpg"]
