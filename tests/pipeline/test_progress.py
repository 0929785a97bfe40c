import io

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import Progress, clock


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
