"""Units hold every row of the source once, cost little to plan, and name wrong columns early."""

import io
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import sources
from pipeline.plan import Plan, plan_table, planned_row_ids, row_id, units_of
from pipeline.slices import cut
from pipeline.sources import Source, SourceFile, open_source
from schemas.errors import ConfigError
from schemas.ledger import PLAN, Unit, UnitKind

JPEGS = pa.array([b"jpeg"] * 10, pa.binary())


def plan(folder, unit_rows=4, image_column=None, keep=()) -> Plan:
    return Plan(open_source(str(folder)), unit_rows, image_column, keep)


def write(path, columns, row_group_size=None):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def test_every_file_is_in_one_unit(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    (tmp_path / "5a.tar").write_bytes(b"x")
    write(tmp_path / "5b.parquet", {"image": JPEGS}, row_group_size=5)
    units = list(plan(tmp_path).units())
    assert [u.number for u in units] == list(range(len(units)))
    images = [u for u in units if u.kind is UnitKind.IMAGES]
    assert [len(u.names) for u in images] == [4, 4, 2]
    assert [name for u in images for name in u.names] == [f"{i}.jpg" for i in range(10)]
    assert [u.rows for u in images] == [4, 4, 2]
    assert [u for u in units if u.kind is UnitKind.TAR] == [Unit(1, UnitKind.TAR, ("5a.tar",))]
    parquet = [(u.names, u.first_row, u.rows) for u in units if u.kind is UnitKind.PARQUET]
    assert parquet == [(("5b.parquet",), 0, 5), (("5b.parquet",), 5, 5)]


def test_documents_share_units_but_large_ones_which_come_last(tmp_path):
    sizes = {"a.pdf": 1, "b.tif": 9, "c.pdf": 3, "d.pdf": 6, "e.PDF": 2, "f.tiff": 8}  # eighths
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"")
        os.truncate(tmp_path / name, size * 1024**2 // 8)
    for i in range(10):
        (tmp_path / f"g{i}.pdf").write_bytes(b"x")
    units = list(plan(tmp_path, unit_rows=100).units())
    assert {u.kind for u in units} == {UnitKind.DOCUMENTS}
    assert {u.rows for u in units} == {None}
    assert [u.names for u in units] == [
        ("a.pdf", "c.pdf"),
        ("d.pdf", "e.PDF"),
        ("f.tiff",),
        tuple(f"g{i}.pdf" for i in range(8)),
        ("g8.pdf", "g9.pdf"),
        ("b.tif",),
    ]


@pytest.mark.parametrize(
    ("groups", "units"),
    [
        ([10] * 10, [(0, 100)]),
        ([10] * 25, [(0, 100), (100, 100), (200, 50)]),
        ([1000], [(0, 1000)]),
        ([1000, 1000], [(0, 1000), (1000, 1000)]),
        ([10, 1000, 10], [(0, 10), (10, 1000), (1010, 10)]),
        ([60, 60, 60], [(0, 120), (120, 60)]),
        ([0, 5, 0, 0], [(0, 5)]),
        ([], []),
    ],
)
def test_row_groups_are_gathered_and_never_cut(groups, units):
    assert list(cut(groups, 100)) == units


def test_a_plan_of_many_files_is_not_held_in_memory(monkeypatch):
    names = (f"folder-{i // 1000:04}/image-{i:07}.jpg" for i in range(100_000))
    listing = (SourceFile(name, 1, "0") for name in names)
    monkeypatch.setattr(sources, "list_files", lambda *_: listing)
    source = Source("memory://many", None, "/many")  # type: ignore[arg-type]
    tracemalloc.start()
    rows = sum(unit.rows or 0 for unit in Plan(source, 256).units())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 100_000
    assert peak < 1e6


@pytest.mark.parametrize("usual", ["image", "JPG", "png", "img"])
def test_the_image_column_is_found_by_its_usual_names(tmp_path, usual):
    struct = pa.array([{"bytes": b"x", "path": "a.jpg"}] * 10)
    write(tmp_path / "a.parquet", {"thumb": JPEGS, usual: struct, "json": JPEGS})
    assert [u.rows for u in plan(tmp_path).units()] == [10]


def test_the_only_binary_column_is_the_image_column(tmp_path):
    write(tmp_path / "a.parquet", {"scan": JPEGS.cast(pa.large_binary()), "n": range(10)})
    assert [u.rows for u in plan(tmp_path).units()] == [10]


@pytest.mark.parametrize(
    ("columns", "image_column"),
    [
        ({"caption": ["a"], "url": ["b"]}, None),
        ({"image": ["a path, not bytes"]}, None),
        ({"one": JPEGS, "two": JPEGS}, None),
        ({"image": JPEGS}, "photo"),
    ],
)
def test_a_source_without_an_image_column_names_the_columns_there_are(
    tmp_path, columns, image_column
):
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(ConfigError) as error:
        list(plan(tmp_path / "a.parquet", image_column=image_column).units())
    for name in columns:
        assert name in str(error.value)
    assert "a.parquet" in str(error.value)
    assert (image_column or "image column") in str(error.value)


def test_one_bad_parquet_file_among_good_ones_is_one_unit(tmp_path):
    write(tmp_path / "a.parquet", {"image": JPEGS})
    write(tmp_path / "b.parquet", {"caption": ["no image"]})
    (tmp_path / "c.parquet").write_bytes(b"PAR1 cut short")
    write(tmp_path / "d.parquet", {"image": pa.array([], pa.binary())})
    units = list(plan(tmp_path, unit_rows=100).units())
    assert [(u.names[0], u.rows) for u in units] == [
        ("a.parquet", 10),
        ("b.parquet", None),
        ("c.parquet", None),
        ("d.parquet", None),
    ]


def test_kept_columns_are_put_together_from_all_files(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"x")
    categories = pa.array(["cat"] * 10).dictionary_encode()
    write(tmp_path / "a.parquet", {"image": JPEGS, "id": range(10), "note": pa.nulls(10)})
    write(tmp_path / "b.parquet", {"image": JPEGS, "label": categories, "note": ["n"] * 10})
    p = plan(tmp_path, keep=("label", "id", "note"))
    list(p.units())
    expected = pa.schema([("label", pa.string()), ("id", pa.int64()), ("note", pa.string())])
    assert p.kept() == expected


def test_a_kept_column_of_two_types_names_both_files(tmp_path):
    write(tmp_path / "a.parquet", {"image": JPEGS, "id": range(10)})
    write(tmp_path / "b.parquet", {"image": JPEGS, "id": ["x"] * 10})
    with pytest.raises(ConfigError, match=r"keep id: it is int64 in a\.parquet and string in b\."):
        list(plan(tmp_path, keep=("id",)).units())


@pytest.mark.parametrize("name", ["text", "row_id", "data", "unit", "pixels"])
def test_a_kept_column_cannot_take_the_name_of_an_output_column(tmp_path, name):
    write(tmp_path / "a.parquet", {"image": JPEGS})
    with pytest.raises(ConfigError, match=name):
        plan(tmp_path, keep=(name,))


def test_a_kept_column_given_twice_is_not_written_twice(tmp_path):
    write(tmp_path / "a.parquet", {"image": JPEGS, "id": range(10)})
    with pytest.raises(ConfigError, match="cannot keep id twice"):
        plan(tmp_path, keep=("id", "id"))


def test_a_kept_column_that_pyarrow_cannot_sort_is_refused_before_the_run(tmp_path):
    views = pa.array([["a"]] * 10, pa.list_(pa.string_view()))
    write(tmp_path / "a.parquet", {"image": JPEGS, "tags": views})
    with pytest.raises(ConfigError, match=r"cannot keep tags: it is list<.*string_view>"):
        list(plan(tmp_path, keep=("tags",)).units())


def test_a_kept_column_that_nobody_has_is_refused(tmp_path):
    write(tmp_path / "a.parquet", {"image": JPEGS})
    p = plan(tmp_path, keep=("id",))
    list(p.units())
    with pytest.raises(ConfigError, match="keep id: no file has such a column; there are: image"):
        p.kept()


def test_row_ids_do_not_depend_on_where_the_data_is_and_never_meet():
    assert row_id("a.jpg") == row_id("a.jpg", None, None)
    keys = [("a", None), ("a", "b"), ("a/b", None), ('a","b', None), ("a", "0"), ("a", "")]
    assert len({row_id(*key) for key in keys}) == len(keys)
    assert all(len(row_id(*key)) == 32 for key in keys)
    # printf '["a/b.jpg", null, null]' | sha256sum: another rule would orphan every dataset there is
    assert row_id("a/b.jpg") == "9359db0413de25f926875f6e5a2f01c8"


def test_the_planned_ids_are_known_where_the_rows_are():
    images = Unit(0, UnitKind.IMAGES, ("a.jpg", "b.jpg"), 0, 2)
    assert planned_row_ids(images) == [row_id("a.jpg"), row_id("b.jpg")]
    rows = Unit(1, UnitKind.PARQUET, ("p",), 5, 2)
    assert planned_row_ids(rows) == [row_id("p", "5"), row_id("p", "6")]
    assert planned_row_ids(Unit(2, UnitKind.TAR, ("t",))) is None


def test_a_unit_survives_its_way_through_parquet():
    units = [
        Unit(0, UnitKind.IMAGES, ("ä.jpg", "b.jpg"), 0, 2),
        Unit(1, UnitKind.TAR, ("t.tar",)),
        Unit(2, UnitKind.PARQUET, ("p.parquet",), 2**40, 7),
    ]
    buffer = io.BytesIO()
    pq.write_table(plan_table(units), buffer)
    table = pq.read_table(buffer)
    assert table.schema.equals(PLAN)
    assert list(units_of(table)) == units
