"""`vl01 quantize` as it is typed: what it says, its exit codes, and that it goes on."""

import pytest

from jobs.cli import main
from jobs.quantize import BytesProgress
from model.weights.convert import Quantizer
from schemas.errors import ExitCode
from tests.model.conftest import write_tiny


@pytest.fixture
def quantize(capsys, tmp_path, monkeypatch):
    """Runs the command in tmp_path; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "bf16")

    def run(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main(["quantize", *arguments])
        captured = capsys.readouterr()
        return leaving.value.code or ExitCode.OK, captured.out, captured.err

    return run


def test_what_was_done_is_told_and_nothing_is_done_twice(quantize, tmp_path):
    code, out, err = quantize("bf16", "int8", "--workers", "1", "--verify")
    assert code == ExitCode.OK
    assert f"output   {tmp_path / 'int8'}" in out
    assert "shards   10" in out
    assert "GB/s" in out.partition("verified")[2]
    assert "about 00:00 left" in err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "int8").iterdir()}
    code, out, _ = quantize("bf16", "int8")
    assert (code, "10 of them were there already" in out) == (ExitCode.OK, True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "int8").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "int8"], "nowhere has no config.json"),
        (["bf16", "bf16"], "holds another checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(quantize, arguments, message):
    code, _, err = quantize(*arguments)
    assert code == ExitCode.USAGE
    assert message in err
    assert err.count("\n") == 1


def test_ctrl_c_says_that_the_same_command_goes_on(quantize, monkeypatch):
    def interrupted(self, workers, read):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Quantizer, "run", interrupted)
        code, _, err = quantize("bf16", "int8")
    assert code == ExitCode.STOPPED
    assert "the same command goes on" in err
    assert quantize("bf16", "int8")[0] == ExitCode.OK


def test_the_line_tells_bytes_pace_and_time_left():
    progress = BytesProgress("quantizing", 10_000_000_000)
    assert "left" not in progress.line().plain
    progress.add(2_500_000_000)
    assert "quantizing 2.50 of 10.00 GB" in progress.line().plain
    assert "about 00:00 left" in progress.line().plain
