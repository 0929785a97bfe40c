"""A source that grows is done to the last file, each row once, wherever a run was cut short."""

import hashlib
import itertools
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline import lease, sources, storage
from pipeline.ledger import Ledger
from pipeline.plan import Plan, row_id, units_of
from pipeline.report import write_report
from pipeline.sources import Source, SourceFile, open_source
from pipeline.status import status
from pipeline.verify import verify
from schemas.errors import ConfigError
from schemas.job import Job
from schemas.ledger import Growth
from tests.documents import tiff
from tests.images import page
from tests.pipeline.fake_run import job_of, run, write_images
from tests.pipeline.test_ledger import Crash, crash_at
from tests.pipeline.test_read import tar_of
from tests.pipeline.test_retry import retry, rows


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)


def growing(tmp_path: Path, **keys) -> Job:
    return job_of(tmp_path / "in", tmp_path / "out", **{"grow": True, "settle_seconds": 0} | keys)


def texts(output: Path) -> list[str]:
    return sorted(row["text"] for row in rows(output).values())


def digests(output: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in output.glob("part-*")}


def todo(ledger: Ledger) -> list[tuple[int, tuple[str, ...]]]:
    return [(u.number, u.names) for table in ledger.pending() for u in units_of(table)]


def replaced(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / f"{number:04}.jpg").write_bytes(b"another %d" % number)


def parquet(path: Path, texts: list[str], group_rows: int = 4) -> None:
    images = pa.array([text.encode() for text in texts], pa.binary())
    pq.write_table(pa.table({"image": images}), path, row_group_size=group_rows)


# What is done when files come and change


def test_new_files_and_replaced_ones_are_done_and_nothing_else(tmp_path):
    write_images(tmp_path / "in", 30)
    run(growing(tmp_path))
    before = digests(tmp_path / "out")
    write_images(tmp_path / "in", 35)  # the first 30 get another time, as a copy gives them
    for number in range(30):
        os.utime(tmp_path / f"in/{number:04}.jpg", ns=(1, number))
    ledger = run(growing(tmp_path))  # so all of them are done again, once
    assert ledger.plan.growth.changed_files == 30
    assert verify(str(tmp_path / "out"), deep=True).ok

    before = digests(tmp_path / "out")
    for number in range(35, 40):
        (tmp_path / f"in/{number:04}.jpg").write_bytes(b"image %d" % number)
    replaced(tmp_path / "in", 1, 2, 17)
    ledger = run(growing(tmp_path))
    growth = ledger.plan.growth
    assert (growth.number, growth.new_files, growth.changed_files) == (2, 5, 3)
    expected = {f"image {i}" for i in range(40)} - {f"image {i}" for i in (1, 2, 17)}
    assert texts(tmp_path / "out") == sorted(expected | {f"another {i}" for i in (1, 2, 17)})
    found = verify(str(tmp_path / "out"), deep=True)
    assert (found.ok, found.rows) == (True, 40)
    after = digests(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"part-000000000.parquet", "part-000000004.parquet"}
    done = [ledger.record(0).history()[-1], ledger.record(4).history()[-1]]
    assert [work.rows for work in done] == [2, 1]


def test_nothing_new_is_nothing_to_do_and_writes_no_plan(tmp_path):
    write_images(tmp_path / "in", 6)
    run(growing(tmp_path))
    before = sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
    ledger = run(growing(tmp_path))
    assert ledger.plan.growth.number == 0
    assert todo(ledger) == []
    assert sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file()) == before


def test_without_the_key_the_source_is_not_listed_again_and_with_it_any_dataset_grows(tmp_path):
    write_images(tmp_path / "in", 6)
    plain = job_of(tmp_path / "in", tmp_path / "out")
    run(plain)
    write_images(tmp_path / "in/later", 3)
    run(plain)
    assert len(rows(tmp_path / "out")) == 6
    run(growing(tmp_path))
    assert len(rows(tmp_path / "out")) == 9


def test_rows_of_files_that_are_gone_stay_and_are_not_done_again_when_they_come_back(tmp_path):
    write_images(tmp_path / "in", 6)
    run(growing(tmp_path))
    (tmp_path / "in/0002.jpg").rename(tmp_path / "elsewhere.jpg")
    (tmp_path / "in/new.jpg").write_bytes(b"new")
    assert run(growing(tmp_path)).plan.growth.gone_files == 1
    assert row_id("0002.jpg") in rows(tmp_path / "out")
    (tmp_path / "elsewhere.jpg").rename(tmp_path / "in/0002.jpg")
    assert run(growing(tmp_path)).plan.growth.number == 1
    assert verify(str(tmp_path / "out"), deep=True).ok


def test_a_file_that_changes_before_it_was_done_is_done_once(tmp_path):
    write_images(tmp_path / "in", 8)
    run(growing(tmp_path)).remove("commits/000000001.json")
    replaced(tmp_path / "in", 0, 5)
    ledger = Ledger(str(tmp_path / "out"))
    ledger.resume()
    ledger.clean_up()
    ledger.grow(growing(tmp_path), open_source(str(tmp_path / "in")))
    assert todo(ledger) == [
        (1, tuple(f"{i:04}.jpg" for i in range(4, 8))),
        (0, ("0000.jpg",)),
    ]
    run(growing(tmp_path))
    assert "another 5" in texts(tmp_path / "out")
    assert verify(str(tmp_path / "out"), deep=True).ok


def test_a_tar_may_have_fewer_or_more_images_than_before(tmp_path):
    (tmp_path / "in").mkdir()
    for members in (3, 1, 5):
        images = {f"{i}.jpg": b"%d of %d" % (i, members) for i in range(members)}
        (tmp_path / "in/a.tar").write_bytes(tar_of(images))
        run(growing(tmp_path))
        assert texts(tmp_path / "out") == [f"{i} of {members}" for i in range(members)]
        assert verify(str(tmp_path / "out"), deep=True).ok


def test_a_parquet_file_may_have_fewer_or_more_rows_or_be_damaged(tmp_path):
    """0 stands for a damaged one; every one of the four follows every other."""
    write_images(tmp_path / "in", 2)
    for count in [8, 30, 8, 3, 30, 3, 8, 0, 3, 0, 30, 0, 8]:
        if count:
            parquet(tmp_path / "in/a.parquet", [f"{i} of {count}" for i in range(count)])
        else:
            (tmp_path / "in/a.parquet").write_bytes(b"PAR1 cut")
        ledger = run(growing(tmp_path))
        found = [row for row in rows(tmp_path / "out").values() if ".parquet" in row["source"]]
        if count:
            assert sorted(row["text"] for row in found) == sorted(
                f"{i} of {count}" for i in range(count)
            )
            assert {row["row_id"] for row in found} == {
                row_id("a.parquet", str(i)) for i in range(count)
            }
        else:
            assert [row["reason"] for row in found] == ["source_damaged"]
        assert verify(str(tmp_path / "out"), deep=True).ok
        assert ledger.totals.rows == count + 2
        assert ledger.totals.uncounted_units == (not count)


def test_addresses_that_are_new_in_a_list_are_done_and_no_other(tmp_path):
    """Appended, and put between others; the address that is gone keeps its row."""
    write_images(tmp_path / "images", 20)
    (tmp_path / "in").mkdir()
    listed = [tmp_path / f"images/{number:04}.jpg" for number in range(20)]
    path = tmp_path / "in/list.csv"

    def write(numbers: list[int]) -> None:
        lines = [f"{listed[number]},note {number}\n" for number in numbers]
        path.write_text("path,note\n" + "".join(lines))

    keys = {"grow": True, "settle_seconds": 0, "keep": ("note",)}
    job = job_of(tmp_path / "in/*.csv", tmp_path / "out", **keys)
    write([0, 1, 2, 3, 4, 5, 0])
    run(job)
    before = digests(tmp_path / "out")
    write([0, 1, 2, 10, 11, 3, 5, 0, 12, 13, 14, 15, 16, 0])
    ledger = run(job)
    found = rows(tmp_path / "out").values()
    expected = [0, 0, 0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16]
    assert sorted(row["text"] for row in found) == sorted(f"image {n}" for n in expected)
    for row in found:
        assert row["note"] == row["text"].replace("image", "note")
    assert {name: digests(tmp_path / "out")[name] for name in before} == before
    assert ledger.totals.rows == len(expected)
    assert verify(str(tmp_path / "out"), deep=True).ok
    path.write_text(path.read_text())
    assert todo(run(job)) == []


def test_a_document_may_have_fewer_or_more_pages(tmp_path):
    """Beside others in its unit, of which nothing is read again."""
    (tmp_path / "in").mkdir()
    frames = [page(seed, (90, 120)) for seed in range(4)]
    (tmp_path / "in/a.tif").write_bytes(tiff(frames[:2]))
    (tmp_path / "in/c.tif").write_bytes(tiff(frames[:1]))
    for pages in (3, 1, 4):
        (tmp_path / "in/b.tif").write_bytes(tiff(frames[:pages]))
        ledger = run(growing(tmp_path))
        found = pyarrow.dataset.dataset(str(tmp_path / "out")).to_table().to_pylist()
        of_b = [("b.tif", number if pages > 1 else None) for number in range(1, pages + 1)]
        assert [(Path(row["source"]).name, row["page"]) for row in found] == [
            ("a.tif", 1),
            ("a.tif", 2),
            *of_b,
            ("c.tif", None),
        ]
        assert verify(str(tmp_path / "out"), deep=True).ok
    assert [work.rows for work in ledger.record(0).history()] == [6, 1, 4]


def test_new_parquet_columns_of_another_type_are_refused_before_anything_is_stored(tmp_path):
    (tmp_path / "in").mkdir()
    image = pa.array([b"a"], pa.binary())
    pq.write_table(pa.table({"image": image, "id": [1]}), tmp_path / "in/a.parquet")
    run(growing(tmp_path, keep=("id",)))
    pq.write_table(pa.table({"image": image, "id": ["x"]}), tmp_path / "in/b.parquet")
    with pytest.raises(ConfigError, match=r"keep id: it is int64 in the dataset and string in b"):
        run(growing(tmp_path, keep=("id",)))
    (tmp_path / "in/b.parquet").unlink()
    pq.write_table(pa.table({"image": image}), tmp_path / "in/c.parquet")
    run(growing(tmp_path, keep=("id",)))
    assert sorted(str(row["id"]) for row in rows(tmp_path / "out").values()) == ["1", "None"]


# Files that are being written


def test_a_file_that_was_just_written_waits_for_the_next_run(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 4)
    for path in (tmp_path / "in").iterdir():
        os.utime(path, (1e9, 1e9))
    job = growing(tmp_path, settle_seconds=60)
    run(job)
    (tmp_path / "in/new.jpg").write_bytes(b"half of i")
    replaced(tmp_path / "in", 2)
    ledger = Ledger(job.output)
    ledger.resume()
    growth = ledger.grow(job, open_source(job.source))
    assert growth == Growth(0, ledger.totals, waiting_files=2)
    run(job)
    assert len(rows(tmp_path / "out")) == 4
    (tmp_path / "in/new.jpg").write_bytes(b"half of it")
    for name in ("new.jpg", "0002.jpg"):
        os.utime(tmp_path / "in" / name, (1.1e9, 1.1e9))
    run(job)
    assert {"half of it", "another 2"} <= set(texts(tmp_path / "out"))
    assert len(rows(tmp_path / "out")) == 5


def test_a_time_far_in_the_future_does_not_keep_a_file_out_for_ever(tmp_path):
    plan = Plan.of(growing(tmp_path, settle_seconds=60), open_source(str(tmp_path.parent)), None)
    assert plan.is_settled(SourceFile("a.jpg", 1, "x", 4e9))
    assert plan.is_settled(SourceFile("a.jpg", 1, "etag", None))


# Cut short


@pytest.mark.slow
def test_a_crash_at_any_write_loses_no_row_doubles_none_and_does_none_again(tmp_path):
    """While it grows by a new unit, a changed image, and a Parquet file with fewer rows."""
    crashes = 0
    for moment in itertools.count():
        folder = tmp_path / f"{moment}"
        write_images(folder / "in", 6)
        parquet(folder / "in/p.parquet", [f"old {i}" for i in range(9)])
        run(growing(folder))
        write_images(folder / "in/new", 2)
        replaced(folder / "in", 1)
        parquet(folder / "in/p.parquet", [f"new {i}" for i in range(3)])
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_at(monkeypatch, moment)
            try:
                run(growing(folder))
                break
            except Crash:
                crashes += 1
        assert len({row for row in rows(folder / "out")}) >= 3  # readable, each id once
        ledger = run(growing(folder))
        images = [f"image {i}" for i in (0, 0, 1, 2, 3, 4, 5)]
        assert texts(folder / "out") == sorted(
            [*images, "another 1", *(f"new {i}" for i in range(3))]
        )
        assert verify(str(folder / "out"), deep=True).ok
        assert ledger.plan.growth.number == 1
        works = [len(ledger.record(unit).history()) for unit in range(ledger.totals.units)]
        assert works == [2, 1, 2, 2, 2, 1]
        assert [p.name for p in (folder / "out/_vl01/tmp").iterdir()] == []
    assert crashes > 2 * (1 + 2 + 3 * 4 + 2)  # lease, two files, four units again, one new


def test_a_run_that_is_cut_short_and_then_grows_more_does_both(tmp_path):
    write_images(tmp_path / "in", 8)
    run(growing(tmp_path))
    replaced(tmp_path / "in", 1, 6)
    ledger = Ledger(str(tmp_path / "out"))
    ledger.resume()
    job, source = growing(tmp_path), open_source(str(tmp_path / "in"))
    assert ledger.grow(job, source).settled == 0
    (tmp_path / "in/0002.jpg").write_bytes(b"a third")
    write_images(tmp_path / "in/more", 1)
    growth = ledger.grow(job, source)
    assert (growth.number, growth.settled) == (2, 0)
    assert todo(ledger) == [
        (2, ("more/0000.jpg",)),
        (0, ("0001.jpg", "0002.jpg")),
        (1, ("0006.jpg",)),
    ]
    found = verify(job.output)
    assert (found.ok, found.pending_units, found.outdated_units) == (False, 1, 2)
    assert status(job.output).pending_units == 3
    report = write_report(job.output).report
    assert (report.units_committed, report.units_outdated) == (2, 2)
    ledger = run(job)
    assert {"another 1", "a third", "another 6"} <= set(texts(tmp_path / "out"))
    assert verify(job.output, deep=True).ok
    write_images(tmp_path / "in/last", 1)
    assert run(job).plan.growth.settled == 2  # whose records need no look any more


# Together with other commands


def test_rows_that_failed_in_any_growth_can_be_done_again(tmp_path):
    write_images(tmp_path / "in", 4)
    job = growing(tmp_path, max_bytes=1000)
    run(job)
    (tmp_path / "in/0001.jpg").write_bytes(b"x" * 1001)
    (tmp_path / "in/0004.jpg").write_bytes(b"x" * 1001)
    run(job)
    assert Counter(row["reason"] for row in rows(tmp_path / "out").values())["too_many_bytes"] == 2
    for number in (1, 4):
        (tmp_path / f"in/{number:04}.jpg").write_bytes(b"mended %d" % number)
    assert retry(tmp_path / "in", tmp_path / "out").rows == {"ok": 2}
    assert {"mended 1", "mended 4"} <= set(texts(tmp_path / "out"))
    assert verify(job.output, deep=True).ok
    # A growth sees that they are others than it knew; it does them once more, and no third time.
    run(job)
    assert len(run(job).record(0).history()) == 4


def test_the_report_counts_the_rows_that_each_run_did(tmp_path):
    write_images(tmp_path / "in", 10)
    run(growing(tmp_path))
    replaced(tmp_path / "in", 3)
    write_images(tmp_path / "in/new", 2)
    run(growing(tmp_path))
    report = write_report(str(tmp_path / "out")).report
    assert (report.rows, sorted(run.rows for run in report.runs)) == (12, [3, 10])


def test_a_million_files_are_compared_without_being_held(tmp_path, monkeypatch):
    """A tenth of it: 100,000 known files, of which one changed, and one new one."""
    listing = [SourceFile(f"{i // 1000:04}/{i:07}.jpg", 1, "a") for i in range(100_000)]
    monkeypatch.setattr(sources, "list_files", lambda *_: iter(listing))
    job = job_of("memory://many", tmp_path / "out", grow=True).model_copy(update={"unit_rows": 256})
    ledger = Ledger(job.output)
    ledger.prepare()
    source = Source(job.source, None, "/many")  # type: ignore[arg-type]
    ledger.create(job, {}, Plan.of(job, source), "run")
    listing[5] = listing[5]._replace(stamp="b")
    listing.append(SourceFile("9999/new.jpg", 1, "a"))
    tracemalloc.start()
    growth = ledger.grow(job, source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (growth.new_files, growth.changed_files) == (1, 1)
    assert peak < 30e6
