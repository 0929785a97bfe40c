"""Every file of a source is found once, in one order, wherever it is."""

import os
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from pipeline import sources
from pipeline.output_folder import OutputFolder
from pipeline.sources import SourceFile, open_source
from schemas.errors import ConfigError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(address: object) -> list[str]:
    return [file.name for file in open_source(str(address)).files()]


def test_files_in_folders_and_in_upper_case_are_not_missed(tmp_path):
    images = ["b.JPG", "a/c.jpeg", "a/d/e.Png", "f.webp", "g.GIF", "h.bmp", "i.tif", "j.TIFF"]
    touch(tmp_path, *images, "k.tar", "l.parquet", "notes.txt", "README", "m.tar.gz")
    assert names(tmp_path) == sorted([*images, "k.tar", "l.parquet"])


def test_photographs_of_a_telephone_are_not_left_out_without_a_word(tmp_path):
    touch(tmp_path, "a.jpg", "b.HEIC", "c/d.heic", "c/README", "e.2024-01-02T03:04", "f.txt")
    touch(tmp_path, ".DS_Store", "._b.heic", ".git/x.heic", "out/_vl01/job.json", "g.d/x.jpg")
    unread: Counter[str] = Counter()
    read = [file.name for file in open_source(str(tmp_path)).files(unread)]
    assert read == ["a.jpg", "g.d/x.jpg"]
    assert unread == {".heic": 2, ".txt": 1, "others": 2}
    unread.clear()
    assert [file.name for file in open_source(f"{tmp_path}/*.[jt]*").files(unread)] == ["a.jpg"]
    assert unread == {".txt": 1}


def test_the_order_does_not_depend_on_how_a_storage_lists_folders(tmp_path):
    files = ["a.jpg", "a/b.jpg", "a-b.jpg", "a0.jpg", "ä.jpg", "a/ü/z.png", "B.jpg"]
    touch(tmp_path, *files)
    memory = fsspec.filesystem("memory")
    for file in files:
        memory.pipe_file(f"/order/{file}", b"x")
    expected = sorted(files, key=lambda name: name.encode())
    assert names(tmp_path) == expected
    assert names("memory://order") == expected


def test_hidden_files_are_not_taken_for_images(tmp_path):
    touch(tmp_path, "a.jpg", ".b.jpg", "._a.jpg", ".cache/c.jpg", "d/.e/f.jpg")
    assert names(tmp_path) == ["a.jpg"]


def test_an_output_inside_of_its_source_is_not_read_again(tmp_path):
    touch(tmp_path, "a.jpg", "out/_vl01/job.json", "out/part-000000000.parquet", "out/b.jpg")
    touch(tmp_path, "out/a/_vl01/job.json", "other/part-000000000.parquet")
    assert names(tmp_path) == ["a.jpg", "other/part-000000000.parquet", "out/b.jpg"]


def test_a_link_back_to_its_own_folder_does_not_loop(tmp_path):
    touch(tmp_path / "data", "a.jpg", "sub/b.jpg")
    touch(tmp_path / "elsewhere", "c.jpg")
    os.symlink(tmp_path / "data", tmp_path / "data/sub/loop")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/link")
    os.symlink(tmp_path / "gone", tmp_path / "data/broken.jpg")
    assert names(tmp_path / "data") == ["a.jpg", "broken.jpg", "link/c.jpg", "sub/b.jpg"]


def test_two_folders_that_link_to_each_other_are_not_read_forty_times(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    os.symlink(tmp_path / "b", tmp_path / "a/to")
    os.symlink(tmp_path / "a", tmp_path / "b/to")
    assert names(tmp_path) == ["a/1.jpg", "a/to/2.jpg", "b/2.jpg", "b/to/1.jpg"]


def test_a_name_that_is_not_utf8_does_not_stop_the_listing(tmp_path):
    touch(tmp_path, "a.jpg")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
        pass
    assert names(tmp_path) == ["a.jpg", "caf\\xe9.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg", "b1.jpg"]),
        ("b?.jpg", ["b1.jpg"]),
        ("[ab]*", ["a.jpg", "b1.jpg"]),
        ("*/*.jpg", ["d/c.jpg"]),
        ("d/*", ["d/c.jpg"]),
        ("**/*.jpg", ["a.jpg", "b1.jpg", "d/c.jpg", "d/e/f.jpg"]),
    ],
)
def test_a_glob_matches_what_a_shell_would(tmp_path, pattern, expected):
    touch(tmp_path, "a.jpg", "b1.jpg", "d/c.jpg", "d/e/f.jpg", "a.txt")
    source = open_source(f"{tmp_path}/{pattern}")
    found = [os.path.relpath(source.path(name), tmp_path) for name, *_ in source.files()]
    assert found == expected


def test_brackets_in_a_real_name_are_not_a_glob(tmp_path):
    touch(tmp_path, "scans [2020]/a?.jpg")
    assert names(tmp_path / "scans [2020]") == ["a?.jpg"]
    assert names(tmp_path / "scans [2020]/a?.jpg") == ["a?.jpg"]


def test_colons_in_a_local_path_do_not_lead_to_another_folder(tmp_path):
    touch(tmp_path, "a::b.jpg", "c::d/e.jpg", "x.jpg")
    assert names(tmp_path / "a::b.jpg") == ["a::b.jpg"]
    assert names(tmp_path / "c::d") == ["e.jpg"]
    assert OutputFolder(f"{tmp_path}/x::y").output == f"{tmp_path}/x::y"


def test_one_file_has_the_name_it_has_in_its_folder(tmp_path):
    touch(tmp_path, "a.jpg", "b.tar")
    assert names(tmp_path / "a.jpg") == ["a.jpg"]
    assert names(f"file://{tmp_path}/b.tar") == ["b.tar"]


def test_the_source_column_is_an_address_one_can_open(tmp_path):
    touch(tmp_path, "a b#.jpg")
    fsspec.filesystem("memory").pipe_file("/addresses/a.jpg", b"x")
    assert open_source(str(tmp_path)).full_address("a b#.jpg") == str(tmp_path / "a b#.jpg")
    assert open_source("memory://addresses").full_address("a.jpg") == "memory:///addresses/a.jpg"


def test_a_relative_folder_is_read_from_where_it_was_named(tmp_path, monkeypatch):
    touch(tmp_path, "data/a.jpg")
    monkeypatch.chdir(tmp_path)
    source = open_source("./data/")
    monkeypatch.chdir("/")
    assert [file.name for file in source.files()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("{tmp}/nowhere", "does not exist"),
        ("{tmp}/nowhere/*.jpg", "does not exist"),
        ("{tmp}/*.png", "nothing to read"),
        ("{tmp}/empty", "nothing to read"),
        ("{tmp}/notes.md", "expected a file ending in .jpg"),
        ("{tmp}/captions", "nothing to read in .*lists/[*].txt"),
        ("{tmp}/captions/*", "nothing to read"),
        ("nope://x/y", "Protocol not known"),
        ("zip://x::{tmp}/nowhere.zip", "No such file"),
        ("zip://x::{tmp}/a.jpg", "not a zip file"),
    ],
)
def test_a_wrong_address_is_one_clear_line(tmp_path, address, message):
    touch(tmp_path, "notes.md", "a.jpg", "captions/a.txt", "captions/a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message) as error:
        open_source(address.format(tmp=tmp_path))
    assert "\n" not in str(error.value)
    assert address.format(tmp=tmp_path) in str(error.value)


def test_a_glob_may_begin_at_the_root(tmp_path):
    touch(tmp_path, "a.jpg")
    first, _, rest = str(tmp_path / "a.jpg").lstrip("/").partition("/")
    source = open_source(f"/{first[:-1]}?/{rest}")
    assert source.full_address(next(source.files()).name) == str(tmp_path / "a.jpg")


def test_a_glob_looks_into_no_folder_that_it_cannot_match(tmp_path, monkeypatch):
    touch(tmp_path, "2024-01/a.jpg", "2023-01/b.jpg", "2024-02/raw/c.jpg", "2024-02/web/raw/d.jpg")
    scanned, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
    assert names(tmp_path / "2024-*" / "raw" / "*.jpg") == ["2024-02/raw/c.jpg"]
    looked_into = {os.path.relpath(path, tmp_path) for path in scanned}
    assert looked_into == {".", "2024-01", "2024-02", "2024-02/raw"}


def test_a_listing_that_breaks_off_is_one_clear_line(monkeypatch, tmp_path):
    def broken(*_):
        yield SourceFile("a.jpg")
        raise RuntimeError("the storage's client gave up")  # botocore's errors are no OSError

    monkeypatch.setattr(sources, "list_files", broken)
    source = open_source(str(tmp_path))
    with pytest.raises(ConfigError, match=f"cannot list {tmp_path}: the storage's client gave up"):
        list(source.files())


def test_a_folder_that_may_not_be_read_is_named_with_what_to_do(monkeypatch, tmp_path):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=f"Permission denied: '{tmp_path}'.* SOURCE without it"):
        open_source(str(tmp_path))


def test_opening_a_big_folder_does_not_list_it_all(monkeypatch, tmp_path):
    def endless(*_):
        yield SourceFile("a.jpg")
        raise AssertionError("listed on after the first file")

    monkeypatch.setattr(sources, "list_files", endless)
    open_source(str(tmp_path))


def test_a_file_that_changes_has_another_size_or_stamp(tmp_path):
    touch(tmp_path, "a.jpg", "b/c.jpg")
    source = open_source(str(tmp_path))
    before = list(source.files())
    assert [(file.name, file.size) for file in before] == [("a.jpg", 1), ("b/c.jpg", 1)]
    assert before == list(source.files())
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    (tmp_path / "b/c.jpg").write_bytes(b"longer")
    after = list(source.files())
    assert after[0] == SourceFile("a.jpg", 1, "1", 1e-9)
    assert after[1].size == 6
    assert after[1].stamp != before[1].stamp
    single = list(open_source(str(tmp_path / "a.jpg")).files())
    assert single == [after[0]]


def test_the_listing_of_any_storage_tells_when_a_file_was_written():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/stamps/a.jpg", b"old")
    (before,) = open_source("memory://stamps").files()
    memory.pipe_file("/stamps/a.jpg", b"new")
    (after,) = open_source("memory://stamps").files()
    assert (before.name, before.size) == ("a.jpg", 3)
    assert before.stamp != after.stamp
    assert (before.modified or 0) > 1e9
    (alone,) = open_source("memory://stamps/a.jpg").files()
    assert alone == after


def test_a_broken_link_is_a_file_without_a_size(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "a.jpg")
    assert list(open_source(str(tmp_path)).files()) == [SourceFile("a.jpg")]
