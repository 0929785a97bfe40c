import io

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import Progress, clock, endings


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_without_a_terminal_is_not_silent(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    console = plain_console()
    with Progress(console) as shown:
        shown.start(3, "loading")
        shown.generated(rows=3, failed=1, tokens=900)
        shown.committed(1)
        shown._done.wait(0.1)
    lines = written(console).splitlines()
    assert len(lines) > 2
    assert "3 rows" in lines[-1]
    assert "1 failed" in lines[-1]
    assert "units 1/3" in lines[-1]


def test_a_log_is_told_at_once_what_a_run_goes_on_to_do():
    """With a line each half minute alone it says for as long that the source is listed."""
    console = plain_console()
    with Progress(console) as shown:
        shown._done.wait(0.3)
        shown.start(3, "loading")
        assert "loading (3 units to do)" in written(console)  # no thread is waited for
        shown._done.wait(0.5)
        shown.stopping(25)
        shown._done.wait(0.5)
    lines = written(console).splitlines()
    told = ["listing the source", "loading (3 units to do)", "stopping within 25 s"]
    assert len(lines) == len(told)
    assert all(what in line for what, line in zip(told, lines, strict=True))


def test_a_refused_run_does_not_say_twice_that_it_lists_the_source():
    console = plain_console()
    with Progress(console) as shown:  # which an error leaves the same way
        shown._done.wait(0.3)
    assert written(console).count("listing the source") == 1


def test_the_time_left_fits_a_terminal_of_80_columns():
    shown = Progress(plain_console())
    shown._started -= 3723
    shown.start(391, "loading")
    shown.generated(rows=45_678, failed=1_234, tokens=100_000_000)
    shown.committed(178)
    shown._first_rows -= 3600  # pyright: ignore[reportOperatorIssue]
    assert "about 1:11:" in str(shown.line())[:76]
    assert "1,234 failed" in str(shown.line())[:80]


def test_who_asks_a_run_to_stop_is_told_that_it_heard():
    shown = Progress(plain_console())
    shown.start(7, "loading")
    shown.generated(rows=5, failed=0, tokens=10)
    shown.stopping(25)
    assert "stopping within 25 s (asked again: at once)  5 rows" in str(shown.line())
    shown.stopping(0)
    assert "]  stopping  5 rows" in str(shown.line())


@pytest.mark.parametrize(("variable", "value"), [("FORCE_COLOR", "1"), ("TERM", "dumb")])
def test_a_log_is_not_filled_with_escape_codes_nor_a_dumb_terminal_left_silent(
    monkeypatch, variable, value
):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: variable == "TERM")
    with Progress(Console(file=file, width=200)) as shown:
        shown._done.wait(0.1)
        assert len(file.getvalue().splitlines()) > 1
    assert "\x1b[" not in file.getvalue()


def test_a_terminal_shows_what_is_done_from_the_first_moment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: True)
    with Progress(Console(file=file, width=200)) as shown:
        assert "listing the source" in file.getvalue()
        shown.start(3, "starting Ray")
        assert "starting Ray (3 units to do)" in file.getvalue()


def test_the_wait_for_the_model_says_what_is_awaited():
    shown = Progress(plain_console())
    assert "listing the source" in str(shown.line())
    shown.start(7, "loading the model")
    assert "loading the model (7 units to do)" in str(shown.line())


def test_what_a_run_waits_for_is_shown_before_the_first_rows_and_after_them():
    shown = Progress(plain_console())
    shown.start(7, "loading the model")
    shown.waiting = "waiting for GPUs"
    assert str(shown.line()).endswith("waiting for GPUs (7 units to do)")
    shown.generated(rows=5, failed=0, tokens=10)
    assert "waiting for GPUs  5 rows" in str(shown.line())
    shown.waiting = None
    assert "waiting" not in str(shown.line())


def test_the_last_line_does_not_say_that_the_model_is_still_loading():
    console = plain_console()
    with Progress(console) as shown:
        shown.start(1, "starting Ray")
        shown.waiting = "starting: rank 0 of 1 loading its layers, 2%"
        shown.generated(rows=5, failed=0, tokens=10)
    assert "loading" not in written(console).splitlines()[-1]


def test_time_left_is_not_invented_before_a_unit_is_done():
    shown = Progress(plain_console())
    shown.start(2, "loading")
    shown.generated(rows=5, failed=0, tokens=10)
    assert "unknown" in str(shown.line())
    shown.committed(1)
    assert "about 00:0" in str(shown.line())


def test_long_runs_show_hours():
    assert clock(59) == "00:59"
    assert clock(3 * 3600 + 62) == "3:01:02"


def test_a_long_list_of_endings_is_cut_and_not_lost():
    unread = {f".{letter}": 1 for letter in "bcdefghijkl"} | {".heic": 1200}
    assert endings({".txt": 1}) == "1 .txt"
    assert endings(unread).startswith("1,200 .heic, 1 .b, 1 .c")
    assert endings(unread).endswith("1 .h, 4 with other endings")
