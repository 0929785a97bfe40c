"""The report must never cost a run its exit code."""

import pytest

from jobs import report
from jobs.cli import main
from schemas.errors import ConfigError
from schemas.job import Job
from tests.pipeline.fake_run import job_of


@pytest.fixture
def job(tmp_path) -> Job:
    return job_of("/in", tmp_path)


def test_a_report_that_fails_after_a_run_is_one_line(job, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("of\nall things")

    monkeypatch.setattr("pipeline.report.write_report", fail)
    report.report_after_run(job, units=1)
    assert capsys.readouterr().err == "vl01: the report was not written: of all things\n"


def test_a_run_of_very_many_units_ends_without_a_report_and_says_so(job, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.report.write_report", None)
    report.report_after_run(job, units=report.MOST_UNITS + 1)
    assert f"vl01 report {job.output}" in capsys.readouterr().err


def test_a_report_on_a_folder_without_a_dataset_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(tmp_path)])
    assert exit_.value.code == 2
    assert "holds no dataset of this tool" in capsys.readouterr().err


def test_the_traceback_of_a_report_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("VL01_DEBUG", "0")
    with pytest.raises(ConfigError):
        main(["report", str(tmp_path), "--debug"])
