"""Many addresses at once come in their order, in bounded memory, each with its own outcome."""

import os
import threading
import tracemalloc

import fsspec
import pytest

from pipeline import storage
from pipeline.fetch import fetch as fetching
from pipeline.fetch import http
from pipeline.fetch.fetch import AHEAD, Fetched, Fetcher, absolute
from pipeline.fetch.settings import FetchSettings
from tests import http_server
from tests.http_server import serve


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)


def fetcher(max_bytes: int = 10**8, requests: int = 4, seconds: float = 20.0) -> Fetcher:
    return Fetcher(FetchSettings(("127.0.0.1",), seconds, requests, 1e4), max_bytes)


def outcomes(addresses, **options) -> list:
    found = fetcher(**options).fetch_all(enumerate(addresses))
    places, fetched = zip(*found, strict=True)
    assert list(places) == list(range(len(addresses)))
    return [what.file.read() if what.file else what.error.reason.value for what in fetched]


def test_files_come_in_the_order_asked_for_whatever_each_takes(tmp_path):
    files = {f"/{i}": b"%d" % i for i in range(60)}
    with serve(files) as site:
        site.answers["/3"] = http_server.fail_then(2, 503, b"3")
        site.answers["/40"] = http_server.redirect("/7")
        found = outcomes([site.url(path) for path in files])
        expected = list(files.values())
        expected[40] = b"7"
        assert found == expected
        assert site.most > 1


def test_no_more_requests_reach_a_host_at_once_than_allowed():
    with serve({f"/{i}": b"x" for i in range(24)}) as site:
        site.seconds = 0.05
        assert outcomes([site.url(path) for path in site.files], requests=2) == [b"x"] * 24
        assert site.most == 2


def test_every_kind_of_address_is_read_or_told_why_not(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"local")
    (tmp_path / "b::c.jpg").write_bytes(b"colons")
    (tmp_path / "large").write_bytes(bytes(2000))
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    fsspec.filesystem("memory").pipe_file("/fetch/a.jpg", b"memory")
    table = {
        f"{tmp_path}/a.jpg": b"local",
        f"{tmp_path}/b::c.jpg": b"colons",
        f"file://{tmp_path}/a.jpg": b"local",
        "memory://fetch/a.jpg": b"memory",
        f"{tmp_path}/empty": b"",
        f"{tmp_path}/large": "too_many_bytes",
        f"{tmp_path}/gone": "not_found",
        f"{tmp_path}": "bad_address",
        f"{tmp_path}/pipe": "bad_address",
        "/dev/zero": "bad_address",
        "ftp://127.0.0.1/a": "bad_address",
        "webhdfs://127.0.0.1/a": "bad_address",
        "simplecache::http://127.0.0.1/a": "bad_address",
        "memory://fetch/a.jpg::http://127.0.0.1/": "bad_address",
        "nonsense://a": "bad_address",
        "HTTP://10.0.0.1/a": "host_refused",
        "\0": "read_error",
    }
    assert dict(zip(table, outcomes(list(table), max_bytes=1000), strict=True)) == table


def test_what_is_not_asked_for_is_neither_read_nor_left_out():
    assert list(fetcher().fetch_all([("a", None)])) == [("a", Fetched())]


def test_files_that_wait_for_their_turn_do_not_fill_the_memory(tmp_path):
    """40 files of 16 MB behind one that is slow: 640 MB would be held if all were in memory."""
    (tmp_path / "big").write_bytes(bytes(16 * 2**20))
    addresses = [f"{tmp_path}/big"] * 40
    tracemalloc.start()
    for _, found in fetcher().fetch_all(enumerate(addresses)):
        assert found.file
        with found.file as file:
            assert len(file.read()) == 16 * 2**20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 160e6  # blocks of 2 MB for 32 files, one file, and the file before it


def test_no_more_is_fetched_ahead_than_a_few_files(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    taken = []

    def addresses():
        for i in range(1000):
            taken.append(i)
            yield i, f"{tmp_path}/a"

    found = fetcher().fetch_all(addresses())
    next(found)
    assert len(taken) == AHEAD
    found.close()
    assert len(taken) == AHEAD


def test_a_reader_that_stops_early_leaves_no_thread_behind(monkeypatch):
    before = set(threading.enumerate())
    with serve() as site:
        site.answers["/busy"] = http_server.fail_then(10**6, 503, b"")
        addresses = [site.url("/x")] * 9 + [site.url("/busy")] * 30
        found = fetcher(seconds=60).fetch_all(enumerate(addresses))
        monkeypatch.setattr(http, "FIRST_WAIT_S", 20.0)
        assert next(found)[1].error
        found.close()
    since = set(threading.enumerate()) - before
    assert not [thread for thread in since if "ThreadPool" in thread.name]


def test_a_full_disk_costs_the_row_that_met_it(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(fetching.tempfile, "SpooledTemporaryFile", full)
    assert outcomes([f"{tmp_path}/a"]) == ["read_error"]


@pytest.mark.parametrize(
    ("address", "beside", "expected"),
    [
        ("a.jpg", "/data/list.txt", "/data/a.jpg"),
        ("sub/../a.jpg", "/data/list.txt", "/data/sub/../a.jpg"),
        ("/other/a.jpg", "/data/list.txt", "/other/a.jpg"),
        ("s3://b/a.jpg", "/data/list.txt", "s3://b/a.jpg"),
        ("a.jpg", "s3://b/lists/l.csv", "s3://b/lists/a.jpg"),
        ("a.jpg", "https://h/lists/l.csv?sign=a/b", "https://h/lists/a.jpg"),
    ],
)
def test_a_relative_address_starts_where_its_list_is(address, beside, expected):
    assert absolute(address, beside) == expected
