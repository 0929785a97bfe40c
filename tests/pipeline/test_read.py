"""Every planned row comes out once, and bad input is a row, whatever a source holds."""

import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.plan import Plan, ids_digest, plan_table, planned_row_ids
from pipeline.read import ReadSettings, read_unit, read_units
from pipeline.sources import open_source
from schemas.ledger import Unit, UnitKind
from schemas.rows import INPUT, with_kept


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)


def read(address, units=None, keep=(), image_column=None, max_bytes=1000, unit_rows=100):
    """All rows of a source (or of some units of it) as dicts, after checks that hold for any."""
    source = open_source(str(address))
    plan = Plan(source, unit_rows, image_column, keep)
    planned = list(plan.units())
    kept = plan.kept()
    settings = pickle.loads(pickle.dumps(ReadSettings(source, max_bytes, image_column, kept)))
    rows = []
    for unit in planned if units is None else units:
        tables = list(read_unit(unit, settings))
        assert all(table.schema.equals(with_kept(INPUT, kept)) for table in tables)
        assert all(0 < table.num_rows <= 16 for table in tables)
        found = pa.concat_tables(tables).to_pylist()
        assert [row["index"] for row in found] == list(range(len(found)))
        assert [row["unit_rows"] for row in found] == [None] * (len(found) - 1) + [len(found)]
        digest = ids_digest(row["row_id"] for row in found)
        assert [row["unit_digest"] for row in found] == [None] * (len(found) - 1) + [digest]
        assert all((row["data"] is None) == (row["reason"] is not None) for row in found)
        assert all(row["read_seconds"] >= 0 for row in found)
        assert planned_row_ids(unit) in (None, [row["row_id"] for row in found])
        rows += found
    return rows


def outcomes(rows) -> list[tuple]:
    return [(row["member"], row["reason"] or row["data"]) for row in rows]


def tar_of(members: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# Image files


def test_a_folder_gives_a_row_for_each_file_bad_ones_too(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"A")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(b"C" * 1001)
    os.symlink("/nowhere", tmp_path / "d.jpg")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/e.jpg").write_bytes(b"E" * 1000)
    rows = read(tmp_path)
    assert [row["source"] for row in rows] == [
        str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "sub/e.jpg")
    ]
    assert [row["data"] for row in rows] == [b"A", b"", None, None, b"E" * 1000]
    assert [row["reason"] for row in rows] == [None, None, "too_many_bytes", "not_found", None]
    assert "1,001 bytes" in rows[2]["message"]
    assert "--max-bytes" in rows[2]["message"]
    assert "a link to nothing" in rows[3]["message"]


def test_many_rows_come_in_small_tables(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.jpg").write_bytes(bytes([i]))
    assert [row["data"] for row in read(tmp_path)] == [bytes([i]) for i in range(40)]


def test_a_table_of_large_images_is_bounded(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(bytes(30 * 2**20))
    settings = ReadSettings(open_source(str(tmp_path)), 2**30)
    units = plan_table(list(Plan(settings.source, 100).units()))
    assert [table.num_rows for table in read_units(units, settings)] == [2, 2]


class Moody(fsspec.AbstractFileSystem):
    """A storage of one file, whose every call fails a few times first."""

    protocol = "moody"
    cachable = False

    def __init__(self, failures: int, data: bytes = b"data", broken: bool = False, **options):
        super().__init__(**options)
        self.failures, self.data, self.broken = failures, data, broken
        self.tries = 0

    def _maybe_fail(self):
        self.tries += 1
        if self.broken or self.tries % (self.failures + 1):
            raise TimeoutError("the storage is asleep")

    def info(self, path, **_):
        self._maybe_fail()
        return {"name": path, "size": len(self.data), "type": "file"}

    def cat_file(self, path, start=None, end=None, **_):
        self._maybe_fail()
        return self.data[start:end]

    def _open(self, path, mode="rb", **_):
        moody = self

        class File(io.BytesIO):
            size = len(moody.data)

            def read(self, size=-1):
                moody._maybe_fail()
                return super().read(size)

        return File(self.data)


def read_moody(monkeypatch, tmp_path, fs, unit):
    (tmp_path / unit.names[0]).write_bytes(b"")
    source = open_source(str(tmp_path))
    object.__setattr__(source, "fs", fs)
    return pa.concat_tables(read_unit(unit, ReadSettings(source, 1000))).to_pylist()


def test_a_storage_that_fails_now_and_then_loses_no_row(monkeypatch, tmp_path):
    image = Unit(0, UnitKind.IMAGES, ("a.jpg",), 0, 1)
    rows = read_moody(monkeypatch, tmp_path, Moody(storage.ATTEMPTS - 1), image)
    assert [row["data"] for row in rows] == [b"data"]
    tar = Unit(0, UnitKind.TAR, ("a.tar",))
    data = tar_of({"1.jpg": b"one", "2.jpg": b"two"})
    rows = read_moody(monkeypatch, tmp_path, Moody(storage.ATTEMPTS - 1, data), tar)
    assert outcomes(rows) == [("1.jpg", b"one"), ("2.jpg", b"two")]


@pytest.mark.parametrize(
    "unit",
    [
        Unit(0, UnitKind.IMAGES, ("a.jpg",), 0, 1),
        Unit(0, UnitKind.TAR, ("a.tar",)),
        Unit(0, UnitKind.PARQUET, ("a.parquet",), 0, 1),
    ],
)
def test_a_storage_that_keeps_failing_gives_failed_rows(monkeypatch, tmp_path, unit):
    (row,) = read_moody(monkeypatch, tmp_path, Moody(0, bytes(100), broken=True), unit)
    assert row["reason"] == "read_error"
    assert "asleep" in row["message"]


# Tar shards


def test_a_tar_gives_its_images_and_nothing_else(tmp_path):
    members = {"x/1.JPG": b"1", "x/1.txt": b"caption", "x/._1.jpg": b"mac", "2.png": b"2" * 1001}
    (tmp_path / "a.tar").write_bytes(tar_of({**members, "3.png": b"", "ü.gif": b"4"}))
    rows = read(tmp_path / "a.tar")
    assert outcomes(rows) == [
        ("x/1.JPG", b"1"),
        ("2.png", "too_many_bytes"),
        ("3.png", b""),
        ("ü.gif", b"4"),
    ]
    assert {row["source"] for row in rows} == {str(tmp_path / "a.tar")}


def test_a_name_that_comes_twice_in_a_tar_is_two_rows(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for data in (b"first", b"second"):
            info = tarfile.TarInfo("a.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    rows = read(tmp_path)
    assert outcomes(rows) == [("a.jpg", b"first"), ("a.jpg#2", b"second")]
    assert rows[0]["row_id"] != rows[1]["row_id"]


def test_a_tar_of_the_folder_it_was_made_in_is_not_taken_for_hidden_files(tmp_path):
    """`tar -cf ../a.tar .` names every file ./NAME."""
    members = {"./a.jpg": b"1", "./x/b.jpg": b"2", "../c.jpg": b"3"}
    hidden = {"./.d.jpg": b"", "./x/._b.jpg": b"", ".x/e.jpg": b"", "x/./.f.jpg": b""}
    (tmp_path / "a.tar").write_bytes(tar_of(members | hidden))
    assert outcomes(read(tmp_path)) == list(members.items())


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_tar_does_not_vanish(tmp_path, kind):
    """Of two names of one file, tar writes the second as a link."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        image, link, other = map(tarfile.TarInfo, ("a.jpg", "b.jpg", "c.txt"))
        image.size, link.linkname, other.linkname = 1, "a.jpg", "a.jpg"
        link.type = other.type = kind
        tar.addfile(image, io.BytesIO(b"1"))
        tar.addfile(link)
        tar.addfile(other)
    rows = read(tmp_path)
    assert outcomes(rows) == [("a.jpg", b"1"), ("b.jpg", "missing_image")]
    assert "a link to a.jpg" in rows[1]["message"]


@pytest.mark.parametrize("cut", range(0, 3 * 1024 + 1024, 128))
def test_a_tar_cut_anywhere_gives_its_good_rows_and_says_so(tmp_path, cut):
    """Three members of 1,024 bytes, then the end mark: also a cut between two members shows."""
    data = tar_of({f"{i}.jpg": bytes([i + 1]) * 512 for i in range(3)})
    (tmp_path / "a.tar").write_bytes(data[:cut])
    rows = read(tmp_path)
    good = min(3, cut // 1024)
    if cut >= 3 * 1024 + 512:  # a part of the end mark is an end
        assert outcomes(rows) == [(f"{i}.jpg", bytes([i + 1]) * 512) for i in range(3)]
    else:
        assert outcomes(rows[:-1]) == [(f"{i}.jpg", bytes([i + 1]) * 512) for i in range(good)]
        assert outcomes(rows[-1:]) == [(None, "source_damaged")]


def test_damage_in_the_middle_of_a_tar_does_not_hide_what_was_before(tmp_path):
    data = bytearray(tar_of({f"{i}.jpg": b"x" * 512 for i in range(3)}))
    data[1024:1536] = os.urandom(512)
    (tmp_path / "a.tar").write_bytes(data)
    assert outcomes(read(tmp_path)) == [("0.jpg", b"x" * 512), (None, "source_damaged")]


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100, b"\x1f\x8b" * 600])
def test_a_file_that_is_no_tar_is_one_row(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    assert outcomes(read(tmp_path)) == [(None, "source_damaged")]


def test_a_file_that_cannot_be_found_by_its_name_is_not_said_to_be_gone(tmp_path):
    for name in (b"\xe9.jpg", b"\xe9.pdf", b"\xe9.tar"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"x")
    rows = read(tmp_path)
    assert {row["reason"] for row in rows} == {"not_found"}
    assert all("its name is not UTF-8: " in row["message"] for row in rows)


@pytest.mark.parametrize("members", [{}, {"a.txt": b"no image"}])
def test_a_tar_without_an_image_is_one_row(tmp_path, members):
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert outcomes(read(tmp_path)) == [(None, "empty_source")]


def test_a_tar_that_went_away_is_one_row(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    rows = read(tmp_path, [Unit(0, UnitKind.TAR, ("gone.tar",))])
    assert outcomes(rows) == [(None, "not_found")]


def test_a_tar_is_not_held_in_memory(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(100):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 2**20
            tar.addfile(info, io.BytesIO(bytes(2**20)))
    settings = ReadSettings(open_source(str(tmp_path)), 2**30)
    tracemalloc.start()
    rows = sum(table.num_rows for table in read_unit(Unit(0, UnitKind.TAR, ("a.tar",)), settings))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 100
    assert peak < 60 * 2**20  # a table of 16 MB, twice while it is made


def test_a_header_that_claims_gigabytes_is_not_believed(tmp_path):
    buffer = io.BytesIO(tar_of({"a.jpg": b"x" * 512}))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        bomb = tarfile.TarInfo("././@PaxHeader")
        bomb.type, bomb.size = tarfile.XHDTYPE, 2**33
        tar.fileobj.write(bomb.tobuf() + bytes(10240))  # type: ignore[union-attr]
    (tmp_path / "a.tar").write_bytes(buffer.getvalue()[: buffer.tell() + 512])
    assert outcomes(read(tmp_path))[0] == ("a.jpg", b"x" * 512)


def test_a_member_that_claims_to_be_longer_than_its_tar_does_not_hang_the_reader(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, claim in (("a.jpg", {}), ("b.txt", {"size": str(10**15)}), ("c.jpg", {})):
            info = tarfile.TarInfo(name)
            info.pax_headers = claim
            tar.addfile(info)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert outcomes(read(tmp_path)) == [("a.jpg", b""), (None, "source_damaged")]


# Parquet files


def test_a_parquet_file_gives_every_row_once_however_it_is_cut(tmp_path):
    images = [bytes([i]) * (i % 7) for i in range(100)]
    table = pa.table({"image": images, "id": range(100)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    for unit_rows in (1, 10, 1000):
        rows = read(tmp_path, unit_rows=unit_rows, keep=("id",))
        assert [row["data"] for row in rows] == images
        assert [row["member"] for row in rows] == [str(i) for i in range(100)]
        assert [row["id"] for row in rows] == list(range(100))


def test_an_empty_row_group_does_not_cost_the_rows_behind_it(tmp_path):
    """As writers leave them that filter their batches."""
    whole = pa.table({"image": [bytes([i]) for i in range(6)]})
    with pq.ParquetWriter(tmp_path / "a.parquet", whole.schema) as writer:
        for start, rows in ((0, 0), (0, 3), (3, 0), (3, 0), (3, 3), (6, 0)):
            writer.write_table(whole.slice(start, rows))
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 6
    for unit_rows in (1, 4, 100):
        rows = read(tmp_path, unit_rows=unit_rows)
        assert [row["data"] for row in rows] == whole["image"].to_pylist()


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_bytes_of_any_binary_type_are_read(tmp_path, type_):
    table = pa.table({"image": pa.array([b"a", None, b"", b"x" * 1001], type_)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row["data"] or row["reason"] or b"" for row in read(tmp_path)] == [
        b"a",
        "missing_image",
        b"",
        "too_many_bytes",
    ]


def test_the_struct_of_hugging_face_datasets_is_read(tmp_path):
    (tmp_path / "shards/pictures").mkdir(parents=True)
    (tmp_path / "shards/pictures/b.jpg").write_bytes(b"from a file")
    (tmp_path.parent / "secret.jpg").write_bytes(b"secret")
    images = [
        {"bytes": b"inline", "path": "a.jpg"},
        {"bytes": None, "path": "pictures/b.jpg"},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "../../secret.jpg"},
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": None, "path": "http://example.org/a.jpg"},
    ]
    pq.write_table(pa.table({"image": images}), tmp_path / "shards/a.parquet")
    rows = [row for row in read(tmp_path) if row["member"]]
    assert [row["data"] or row["reason"] for row in rows] == [
        b"inline",
        b"from a file",
        "not_found",
        "missing_image",
        "missing_image",
        "missing_image",
        "missing_image",
        "missing_image",
    ]
    assert all("out of the source" in row["message"] for row in rows[5:])


def test_a_path_that_is_not_utf8_does_not_cost_the_rows_behind_it(tmp_path):
    paths = pa.array([b"a.jpg", b"\xff.jpg", b"b.jpg", b"\xff.jpg"])
    data = pa.array([b"A", b"B", b"C", None])
    not_utf8 = pa.Array.from_buffers(pa.string(), 4, paths.buffers())
    images = pa.StructArray.from_arrays([data, not_utf8], ["bytes", "path"])
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    assert [row["data"] or row["reason"] for row in read(tmp_path)] == [
        b"A",
        b"B",
        b"C",
        "not_found",
    ]


def test_kept_columns_keep_their_types_and_are_null_where_there_are_none(tmp_path):
    (tmp_path / "z.jpg").write_bytes(b"z")
    nested = [{"w": 1, "tags": ["a"]}, None]
    columns = {
        "image": [b"a", b"b"],
        "price": pa.array([1, None], pa.decimal128(9, 2)),
        "when": pa.array([0, 1], pa.timestamp("ns", "UTC")),
        "nested": nested,
        "label": pa.array(["cat", "dog"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"c"]}), tmp_path / "b.parquet")
    rows = read(tmp_path, keep=("price", "when", "nested", "label"))
    assert [row["label"] for row in rows] == [None, "cat", "dog", None]
    assert [row["nested"] for row in rows] == [None, *nested, None]
    assert str(rows[1]["price"]) == "1.00"
    assert rows[2]["when"].value == 1


def test_a_parquet_file_that_changed_since_planning_keeps_its_planned_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x"] * 10}), path)
    units = [Unit(0, UnitKind.PARQUET, ("a.parquet",), 0, 10)]
    pq.write_table(pa.table({"image": [b"x"] * 4}), path)
    rows = read(tmp_path, units)
    assert [row["data"] or row["reason"] for row in rows] == [b"x"] * 4 + ["source_damaged"] * 6
    pq.write_table(pa.table({"image": [b"x"] * 11}), path)
    assert len(read(tmp_path, units)) == 10
    (tmp_path / "b.jpg").write_bytes(b"")
    pq.write_table(pa.table({"other": [1] * 10}), path)
    assert {row["reason"] for row in read(tmp_path, units)} == {"missing_column"}
    path.unlink()
    assert [row["reason"] for row in read(tmp_path, units)] == ["not_found"] * 10


def test_damage_inside_of_a_parquet_file_costs_the_rows_behind_it(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.bytes(500) for _ in range(40)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=20, use_dictionary=False)
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 64)
    rows = read(tmp_path)
    assert [row["data"] for row in rows[:20]] == images[:20]
    assert {row["reason"] for row in rows[20:]} == {"source_damaged"}
    assert len(rows) == 40


def test_a_parquet_file_that_could_not_be_planned_is_one_row(tmp_path):
    (tmp_path / "z.jpg").write_bytes(b"z")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    pq.write_table(pa.table({"caption": ["b"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "c.parquet")
    rows = read(tmp_path)
    assert [row["reason"] for row in rows] == [
        None,
        "source_damaged",
        "missing_column",
        "empty_source",
    ]
    assert "caption (string)" in rows[2]["message"]


def test_a_huge_row_group_is_not_held_in_memory(tmp_path):
    """Pages are read one by one, and pyarrow's own pages hold 1,024 values: here 16 to see it."""
    rng = np.random.default_rng(0)
    table = pa.table({"image": [rng.bytes(100_000) for _ in range(1000)]})
    pq.write_table(
        table, tmp_path / "a.parquet", compression="none", write_batch_size=16, use_dictionary=False
    )
    del table
    settings = ReadSettings(open_source(str(tmp_path)), 2**30)
    unit = Unit(0, UnitKind.PARQUET, ("a.parquet",), 0, 1000)
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    for _ in read_unit(unit, settings):
        peak = max(peak, pool.bytes_allocated() - before)
    assert peak < 40_000_000  # of 100 MB
