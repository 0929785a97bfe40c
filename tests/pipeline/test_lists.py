"""Every address of a list becomes a row under a name that stays, and what is no list says so."""

import json
import time
import tracemalloc

import pytest

from pipeline.lists import AddressList, Group, address_of
from pipeline.storage import PatientFile, open_fs
from schemas.errors import ConfigError


def groups(path, uri_column=None, rows=10**9, keep=()) -> list[Group]:
    with PatientFile(*open_fs(str(path))) as file:
        return list(AddressList(file, str(path), uri_column, keep).groups(rows))


def members(path, uri_column=None) -> list[str]:
    return [member for group in groups(path, uri_column) for member in group.members]


def write(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_comments_and_blank_lines_of_a_text_are_no_rows(tmp_path):
    text = "\ufeff# photos\nhttps://a/1.jpg\r\n\n   \n  a b.jpg \n#x\nhttps://a/2.jpg#top"
    path = write(tmp_path / "a.txt", text)
    assert members(path) == ["https://a/1.jpg", "a b.jpg", "https://a/2.jpg#top"]


def test_an_address_that_comes_again_is_another_row_that_keeps_its_name_as_the_list_grows(tmp_path):
    lines = ["a", "b", "a", "a#2", "a", "c#7", "a#2"]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    expected = ["a", "b", "a#2", "a#2#1", "a#3", "c#7#1", "a#2#2"]
    assert members(path) == expected
    assert [address_of(member) for member in expected] == lines
    write(path, "\n".join([*lines, "b", "c#7", "d"]))
    assert members(path) == [*expected, "b#2", "c#7#2", "d"]


def test_repeats_are_numbered_over_all_groups(tmp_path):
    path = write(tmp_path / "a.txt", "x\ny\n" * 5)
    found = groups(path, rows=3)
    assert [len(group.members) for group in found] == [3, 3, 3, 1]
    assert len({member for group in found for member in group.members}) == 10
    assert [group.offset for group in found] == [0, 6, 12, 18]


@pytest.mark.parametrize("name", ["uri", "url", "URL", "path", "address"])
def test_a_usual_column_is_found_by_itself(tmp_path, name):
    csv = write(tmp_path / "a.csv", f"id,{name}\n1,a.jpg\n")
    jsonl = write(tmp_path / "a.jsonl", json.dumps({"id": 1, name: "a.jpg"}))
    assert members(csv) == members(jsonl) == ["a.jpg"]


def test_another_column_is_read_when_it_is_named(tmp_path):
    csv = write(tmp_path / "a.csv", "url,thumb\nlarge,small\n")
    jsonl = write(tmp_path / "a.jsonl", '{"url": "large", "thumb": "small"}')
    assert members(csv, "thumb") == members(jsonl, "thumb") == ["small"]


@pytest.mark.parametrize(
    ("columns", "wanted"), [(["a", "b"], None), (["url", "path"], None), (["url"], "photo")]
)
def test_a_column_that_cannot_be_chosen_is_told_with_those_there_are(tmp_path, columns, wanted):
    csv = write(tmp_path / "a.csv", ",".join(columns) + "\n" + "x," * len(columns))
    with pytest.raises(ConfigError) as error:
        members(csv, wanted)
    for name in ["--uri-column", "a.csv", wanted or "address", *columns]:
        assert name in str(error.value)
    jsonl = write(tmp_path / "a.jsonl", json.dumps(dict.fromkeys(columns, "x")))
    with pytest.raises(ConfigError, match=r"a\.jsonl"):
        members(jsonl, wanted)


def test_a_csv_that_begins_with_blank_lines_is_not_taken_for_an_empty_one(tmp_path):
    path = write(tmp_path / "a.csv", "\r\n\nid,url\n1,a.jpg\n2,b.jpg\n")
    assert groups(path, rows=1) == [Group(10, ("a.jpg",)), Group(18, ("b.jpg",))]


def test_quotes_commas_and_line_ends_in_a_csv_are_read_as_spreadsheets_write_them(tmp_path):
    text = 'url,caption\r\n"a,b.jpg","two\r\nlines"\r\n\r\nc.jpg,"he said ""hm"""\r\n'
    path = write(tmp_path / "a.csv", text)
    assert members(path) == ["a,b.jpg", "c.jpg"]
    with PatientFile(*open_fs(str(path))) as file:
        opened = AddressList(file, str(path), None, ("caption", "other"))
        found = list(opened.groups(1))
        values = [opened.values(group) for group in found]
    assert opened.kept == {"caption"}
    assert [value["caption"] for (value,) in values] == ["two\r\nlines", 'he said "hm"']


@pytest.mark.parametrize(
    "text", ["url\nx\n", "not json\n", "null", "[]", '{"url": 1}', '{"url": ""}', "[" * 10**5]
)
def test_a_line_without_an_address_is_a_row_that_names_the_line(tmp_path, text):
    path = write(tmp_path / "a.jsonl", '{"url": "a"}\n' + text.split("\n")[0] + '\n{"url": "b"}\n')
    assert members(path) == ["a", "#line 2", "b"]
    assert address_of("#line 2") is None


def test_cells_without_an_address_are_rows_too(tmp_path):
    long = "x" * 10_000
    path = write(tmp_path / "a.csv", f'id,url\n1,a\n2\n3,""\n4,#b\n5,{long}\n6,"\n"\n7,c\n')
    assert members(path) == ["a", *(f"#line {i}" for i in (3, 4, 5, 6, 7)), "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'url\n"open\nb\nc\n', "line 4: unexpected end of data"),
        ("a.csv", 'url\n"a"b\n', "line 2"),
        ("a.csv", "url\n" + '"' + "x\n" * 600_000, "field larger"),
        ("a.txt", bytes(3 * 2**20), "longer than a megabyte"),
        ("a.txt", "photo.jpg\n".encode("utf-16"), "UTF-16"),
        ("a.jsonl", "a\nb\n", "no address in 2 lines"),
        ("a.jsonl", '{"uri": "a"}\n', "no address under 'url' in 1 lines"),
    ],
)
def test_what_is_no_list_is_refused_before_the_run(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=message) as error:
        members(path, "url" if name == "a.jsonl" and "uri" in str(content) else None)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_characters_that_are_not_utf8_do_not_stop_the_list(tmp_path):
    assert members(write(tmp_path / "a.txt", b"caf\xe9.jpg\nb.jpg\n")) == ["caf\\xe9.jpg", "b.jpg"]


def test_a_long_field_beside_the_addresses_does_not_cost_the_list(tmp_path):
    path = write(tmp_path / "a.csv", f'url,text\na.jpg,"{"x" * 200_000}"\nb.jpg,y\n')
    assert members(path) == ["a.jpg", "b.jpg"]


def test_lines_over_the_ends_of_blocks_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.lists._BLOCK_BYTES", 7)
    lines = [f"photo-{'x' * (i % 23)}-{i}.jpg" for i in range(200)]
    assert members(write(tmp_path / "a.txt", "\n".join(lines))) == lines
    path = write(tmp_path / "a.csv", "url\n" + "\n".join(lines))
    found = groups(path, rows=9)
    assert [member for group in found for member in group.members] == lines
    whole = path.read_bytes()
    assert all(whole[g.offset :].startswith(g.members[0].encode()) for g in found)


def test_values_of_a_list_that_was_changed_are_not_those_of_other_rows(tmp_path):
    path = write(tmp_path / "a.csv", "url,n\na,1\nb,2\nc,3\nd,4\n")
    _, group = groups(path, rows=2)
    write(path, "url,n\na,1\nb,2\nX,3\n")
    with PatientFile(*open_fs(str(path))) as file:
        assert AddressList(file, str(path)).values(group) == [{}, {}]


@pytest.mark.parametrize(
    "lines", [["new,0", "a,1", "b,2", "a,3", ",4", "c,5"], ["b,2", "a,1", "c,5", "a,3"]]
)
def test_kept_columns_are_not_lost_where_lines_were_put_in_or_taken_out(tmp_path, lines):
    path = write(tmp_path / "a.csv", "url,n\na,1\nb,2\na,3\n,4\nc,5\n")
    _, second, third = groups(path, rows=2)
    assert second.members + third.members == ("a#2", "#line 5", "c")
    write(path, "\n".join(["url,n", *lines, ""]))
    with PatientFile(*open_fs(str(path))) as file:
        addresses = AddressList(file, str(path))
        assert addresses.values(second) == [{"url": "a", "n": "3"}, {}]
        assert addresses.values(third) == [{"url": "c", "n": "5"}]


def test_kept_columns_are_not_lost_where_a_line_has_another_column_that_is_called_like_one(
    tmp_path,
):
    lines = [{"url": "a"}, {"url": "b", "path": "x/b"}, {"path": "x/c"}, {"url": "d", "id": 4}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    with PatientFile(*open_fs(str(path))) as file:
        addresses = AddressList(file, str(path))
        each = list(addresses.groups(1))
        assert [group.members[0] for group in each] == ["a", "b", "#line 3", "d"]
        assert [addresses.values(group)[0] for group in each] == lines


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,url\n1, a \n2,b\n3, a \n4,\n5,#x\n"),
        ("a.jsonl", '{"id": "1", "url": " a "}\n{"id": "2", "url": "b"}\n{"id": "3", "url": "a"}\n'
         '{"id": "4"}\n{"id": "5", "url": 7}\n'),
    ],
)  # fmt: skip
def test_kept_columns_are_not_lost_where_the_address_has_blanks_or_is_missing(tmp_path, name, text):
    path = write(tmp_path / name, text)
    nameless = ["#line 5", "#line 6"] if name == "a.csv" else ["#line 4", "#line 5"]
    found = groups(path, rows=2)
    assert [m for g in found for m in g.members] == ["a", "b", "a#2", *nameless]
    with PatientFile(*open_fs(str(path))) as file:
        values = [row for group in found for row in AddressList(file, str(path)).values(group)]
    assert [value["id"] for value in values] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_a_long_list_is_planned_fast_and_in_little_memory(tmp_path, kind):
    """100,000 of them; the figures for a million are in proportion."""
    path = tmp_path / f"a.{kind}"
    with path.open("w") as file:
        if kind == "csv":
            file.write("id,url\n")
        for i in range(100_000):
            url = f"https://images.example.org/photos/{i // 1000:04}/{i:07}.jpg"
            line = {"txt": url, "csv": f"{i},{url}", "jsonl": json.dumps({"id": i, "url": url})}
            file.write(line[kind] + "\n")
    with PatientFile(*open_fs(str(path))) as file:
        began = time.monotonic()
        assert sum(len(g.members) for g in AddressList(file, str(path)).groups(256)) == 100_000
        assert time.monotonic() - began < 20  # 1 s when the machine has nothing else to do
    small = tmp_path / f"b.{kind}"
    small.write_text("\n".join(path.read_text().splitlines()[:50_000]))
    with PatientFile(*open_fs(str(small))) as file:
        tracemalloc.start()
        for _ in AddressList(file, str(small)).groups(256):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 20e6  # two blocks of 4 MB, 8 bytes a record
