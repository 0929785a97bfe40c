"""`vl01 retry`: the job is the one that wrote OUT, and only so much of it may be changed."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jobs.cli import main
from pipeline.replacer import RetrySummary
from schemas.errors import ExitCode, StoppedError
from schemas.job import KEYS, RETRY_MAY_CHANGE, WHERE_AND_HOW_FAST, Job

STORED = Job.model_validate(
    {"source": "/photos", "output": "/elsewhere", "model": "/ckpt", "prompt": "?", "pp": 2}
    | {"keep": ("url",), "seed": 7}
)
DONE = RetrySummary("/out", 3, 9, again=30, rows={"ok": 20, "failed": 10}, reasons={"timeout": 10})


@pytest.fixture
def vl01(capsys, monkeypatch):
    """Runs `vl01 retry`; returns exit code, both outputs, and what pipeline.retry was asked for."""
    asked = []
    stand_in = SimpleNamespace(answer=DONE)

    def retry(job, choice, changed):
        asked.append((job, choice, changed))
        if isinstance(stand_in.answer, BaseException):
            raise stand_in.answer
        return stand_in.answer

    stand_in.retry, stand_in.Choice = retry, lambda *chosen: chosen
    early = SimpleNamespace(check=lambda job: None)
    early.stored_job = lambda output, endpoint_url: STORED.model_dump(mode="json")
    monkeypatch.setitem(sys.modules, "pipeline.retry", stand_in)
    monkeypatch.setitem(sys.modules, "pipeline.early", early)
    monkeypatch.setattr("jobs.retry.report_after_run", lambda *_: None)

    def run(*arguments: str, answer: object = DONE):
        stand_in.answer = answer
        with pytest.raises(SystemExit) as leaving:
            main(["retry", *arguments])
        captured = capsys.readouterr()
        return leaving.value.code or ExitCode.OK, captured.out, captured.err, asked

    return run


def test_the_job_is_the_stored_one_in_its_place_of_today(vl01):
    code, out, _, asked = vl01("/out")
    assert code == ExitCode.OK
    assert asked == [
        (STORED.model_copy(update={"output": "/out"}), (frozenset({"failed"}), frozenset()), {})
    ]
    assert "30 rows in 3 units" in out
    assert "20 of 30 are ok: 20 ok, 10 failed" in out
    assert "10 timeout" in out


def test_where_and_how_fast_may_be_changed(vl01):
    flags = [
        "--pp",
        "4",
        "--decode-seconds",
        "120",
        "--model",
        "/new",
        "--endpoint-url",
        "http://localhost:1",
    ]
    chosen = ["--status", "truncated", "--status", "failed", "--reason", "timeout"]
    _, _, _, ((job, choice, changed),) = vl01("/out", *flags, *chosen)
    changes = {"output": "/out", "pp": 4, "decode_seconds": 120.0, "model": "/new"}
    assert job == STORED.model_copy(update=changes | {"endpoint_url": "http://localhost:1"})
    assert choice == (frozenset({"truncated", "failed"}), frozenset({"timeout"}))
    assert changed == {}


def test_how_answers_are_drawn_may_be_changed_for_the_rows_of_a_retry_alone(vl01):
    flags = ["--status", "truncated", "--max-new-tokens", "512", "--temperature", "0"]
    _, _, err, ((job, _, changed),) = vl01("/out", *flags, "--seed", "8")
    assert job == STORED.model_copy(update={"output": "/out"})  # whose fingerprint is OUT's
    assert changed == {"max_new_tokens": 512, "seed": 8}
    assert err == ""


@pytest.mark.parametrize("status", ["truncated", "invalid"])
def test_answers_that_are_asked_the_same_again_are_told_to_answer_the_same(vl01, status):
    code, _, err, _ = vl01("/out", "--status", status)
    assert code == ExitCode.OK
    assert "answer the same unless their images changed. --max-new-tokens (was 256)" in err
    _, _, err, _ = vl01("/out", "--status", "failed")
    assert err == ""


def test_hosts_that_were_refused_may_be_allowed_now(vl01):
    hosts = ["--allow-host", "files.corp", "--allow-host", "10.0.0.0/8"]
    _, _, _, ((job, _, _),) = vl01("/out", *hosts, "--reason", "host_refused")
    assert job.allow_host == ("files.corp", "10.0.0.0/8")


def test_what_else_decides_the_text_may_not_be_changed(vl01):
    _, out, _, _ = vl01("--help")
    of_whole_runs = {"output", "strict", "max_failure_rate", "grow", "settle_seconds"}
    of_whole_runs |= {"documents", "markdown"}
    for key in KEYS:
        allowed = key in WHERE_AND_HOW_FAST - of_whole_runs or key in RETRY_MAY_CHANGE
        assert (f"--{key.replace('_', '-')} " in out) == allowed, key


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt", "x"], "No such option: --prompt"),
        (["--status", "ok"], "rows that are ok are not done again"),
        (["--status", "bad"], "'bad' is not one of"),
        (["--reason", "bad"], "'bad' is not one of"),
        (["--pp", "0"], "--pp is '0'"),
        (["--temperature", "-1"], "--temperature is '-1'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(vl01, flags, expected):
    code, _, err, asked = vl01("/out", *flags)
    assert (code, asked) == (ExitCode.USAGE, [])
    assert expected in err.splitlines()[0]


def test_a_retry_that_was_stopped_exits_1(vl01):
    code, _, err, _ = vl01("/out", answer=StoppedError("stopped by SIGTERM: 1 of 3 units"))
    assert code == ExitCode.STOPPED
    assert "stopped by SIGTERM" in err


def test_units_that_the_run_has_not_done_are_not_passed_over(vl01):
    for done in (RetrySummary("/out", 0, 9, 2), replace(DONE, unfinished_units=2)):
        _, out, _, _ = vl01("/out", answer=done)
        assert "2 units of 9, which the run's own command does" in out
    assert "left" not in vl01("/out", answer=DONE)[1]


def test_a_dataset_without_such_rows_says_so(vl01):
    code, out, _, _ = vl01("/out", answer=RetrySummary("/out", 0, 9))
    assert code == ExitCode.OK
    assert "none is to be done again" in out
