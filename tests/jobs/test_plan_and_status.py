"""`vl01 plan` and `vl01 status`: what they print, their JSON, and the promised exit codes."""

import json
from pathlib import Path
from typing import NoReturn

import pytest

from jobs import show
from jobs.cli import main
from jobs.show_status import show_status
from model.nano.random_checkpoint import write_random_checkpoint
from pipeline.lease import Holder
from pipeline.ledger import Ledger
from pipeline.status import Pace, Status
from schemas.errors import ExitCode
from tests.images import good_images
from tests.sources import write_source


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), tile=56)


@pytest.fixture
def vl01(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = leaving.value.code or 0
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return run


@pytest.fixture
def job(tmp_path, checkpoint) -> Path:
    write_source(tmp_path / "in", good_images(9))
    path = tmp_path / "job.yaml"
    path.write_text(f"source: in\noutput: out\nmodel: {checkpoint}\nmax_new_tokens: 10\npp: 2\n")
    return path


def test_a_plan_shows_what_the_run_will_read_and_cost(vl01, job, tmp_path):
    price = ("--tokens-per-second", 100, "--gpu-hour-price", 3)
    code, shown, wrong = vl01("plan", job, *price)
    assert (code, wrong) == (ExitCode.OK, "")
    assert "9: 3 image files, 3 in tars, 3 in Parquet files" in shown
    assert "all 9 were read" in shown
    assert "2 GPUs of 80 GiB" in shown
    assert "2 in a replica, by layers, with weights and the most it can be busy: 0 to" in shown
    assert "to 7 (0.0 GiB, " in shown
    assert "GPU-hours" in shown
    assert "at 3 per GPU-hour" in shown
    assert not (tmp_path / "out").exists()


def test_a_plan_takes_the_arguments_of_the_run(vl01, job, checkpoint, tmp_path):
    keys = ("--output", tmp_path / "out", "--model", checkpoint, "--max-new-tokens", 10)
    code, shown, wrong = vl01("plan", "caption", tmp_path / "in", *keys, "--pp", 2, "--json", "-")
    assert (code, wrong) == (ExitCode.OK, "")
    _, of_file, _ = vl01("plan", job, "--json", "-")
    _, by_name, _ = vl01("plan", "run", "--json", "-", job)
    assert json.loads(shown) == json.loads(of_file) == json.loads(by_name)


def test_one_image_is_not_called_files(vl01, job, tmp_path):
    (tmp_path / "in/one.jpg").write_bytes(b"")
    job.write_text(job.read_text().replace("source: in", "source: in/one.jpg"))
    _, shown, _ = vl01("plan", job)
    assert "1 image file\n" in shown


def test_an_unknown_speed_is_said_to_be_unknown(vl01, job):
    _, shown, _ = vl01("plan", job)
    assert "not known" in shown
    assert "hours" not in shown


def test_a_plan_as_json_is_nothing_but_json(vl01, job, tmp_path):
    _, shown, _ = vl01("plan", job, "--json", "-")
    _, beside, _ = vl01("plan", job, "--json", tmp_path / "plan.json")
    told = json.loads(shown)
    assert told == json.loads((tmp_path / "plan.json").read_text())
    assert "image files" in beside
    assert told["rows"]["tar"]["rows"] == 3
    assert told["exact"] is True
    first, last = told["ranks"]
    assert (first["first_layer"], last["last_layer"]) == (0, 7)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--gpu-memory-gib", 0.5), "too small"),
        (("--json", "/nowhere/plan.json"), "cannot write --json"),
        (("--tokens-per-second", 0), "tokens-per-second"),
    ],
)
def test_a_plan_that_cannot_be_ends_with_2_and_one_clear_line(vl01, job, flags, says):
    code, _, wrong = vl01("plan", job, *flags)
    assert code == ExitCode.USAGE
    assert says in wrong
    assert "Traceback" not in wrong


def test_status_ends_with_0_for_a_dataset_and_2_for_anything_else(vl01, tmp_path):
    code, _, wrong = vl01("status", tmp_path)
    assert code == ExitCode.USAGE
    assert "no dataset" in wrong
    ledger = Ledger(str(tmp_path / "out"))
    ledger.prepare()
    ledger.write(
        "lease.json",
        b'{"run": "r", "host": "h", "machine": "m", "pid": 1, "started": "", "refreshed_at": 0}',
    )
    code, shown, _ = vl01("status", tmp_path / "out")
    assert code == ExitCode.OK
    assert "being listed" in shown
    assert "seems dead" in shown


def test_status_says_when_rows_are_scaled_up_and_when_the_run_will_end(capsys):
    holder = Holder("run-1", "node-7", "elsewhere", 42, "", 0.0)
    pace = Pace(rows_per_second=10.0, units_per_second=0.5, seconds=600.0)
    show_status(
        Status("out", 4000, 3000, 0, 2000, 90_000, {"ok": 90_000}, {}, None, pace, holder, True)
    )
    shown = capsys.readouterr().out
    assert "3,000 of 4,000 are done (75.0%)" in shown
    assert "about 90,000" in shown
    assert "scaled up from 2,000 records" in shown
    assert "10.00 rows/s over 10.0 minutes" in shown
    assert "1,000 units, about 33 min" in shown
    assert "process 42 on node-7" in shown


@pytest.mark.parametrize("command", ["status", "verify", "report"])
def test_a_large_dataset_is_not_looked_at_without_a_sign_of_life(monkeypatch, command):
    class AtWorkError(Exception):
        """Of the sign."""

    def busy(what: str) -> NoReturn:
        raise AtWorkError(what)

    monkeypatch.setattr(show, "busy", busy)
    with pytest.raises(AtWorkError):
        main([command, "out"])


def test_a_pace_of_seconds_is_not_over_0_minutes(capsys):
    show_status(Status("out", 1, 1, 0, 1, 9, {"ok": 9}, {}, None, Pace(4.5, 0.5, 2.0), None, False))
    assert "4.50 rows/s over 2.0 seconds" in capsys.readouterr().out


def test_one_unit_that_is_left_is_not_called_units(capsys):
    show_status(Status("out", 1, 0, 0, 0, 0, {}, {}, None, None, None, False))
    assert "left     1 unit\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "verify", "report", "retry"])
def test_a_file_is_no_dataset_and_not_a_broken_one(vl01, tmp_path, command):
    (tmp_path / "a.jpg").write_bytes(b"x")
    code, _, err = vl01(command, tmp_path / "a.jpg")
    assert code == ExitCode.USAGE
    assert "a.jpg holds no dataset of this tool" in err


def test_a_misspelt_task_is_not_taken_for_a_job_file(vl01, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, err = vl01("plan", "captoin", "photos", "--output", "out")
    assert "No such command 'captoin'. Did you mean 'caption'?" in err
    (tmp_path / "captoin").write_text("pp: 1")
    assert "captoin: " in vl01("plan", "captoin")[2]
