"""The `vl01` command: help that teaches, one clear line for a mistake, the promised exit codes."""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import ladder
from jobs.cli import main
from pipeline.verify import Verification
from schemas.errors import CheckpointError, EngineError, ExitCode
from schemas.job import KEYS, Job
from schemas.ledger import Growth, PlanTotals
from schemas.report import Summary

CAPTION = ["caption", "photos", "--output", "out", "--model", "ckpt"]


@pytest.fixture
def vl01(capsys, monkeypatch):
    """Runs the command; returns exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("VL01_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main(list(arguments))
        captured = capsys.readouterr()
        code = leaving.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return run


class Flow:
    """Stands in for pipeline.run: keeps what it was asked for, answers as it was told to."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.answer: Summary | BaseException = Summary("out", 1, {"ok": 3})

    def run(self, job: Job) -> Summary:
        self.jobs.append(job)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def flow(monkeypatch):
    flow = Flow()
    monkeypatch.setitem(sys.modules, "pipeline.run", flow)
    monkeypatch.setitem(sys.modules, "pipeline.early", SimpleNamespace(check=lambda job: None))
    return flow


def test_help_comes_at_once_and_loads_nothing_heavy():
    check = (
        "import sys\nfrom jobs.cli import main\n"
        "try: main(['caption', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - start < 10  # a second when the machine has nothing else to do


def test_ctrl_c_while_libraries_are_imported_is_no_traceback(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    begun = [sys.executable, "-m", "jobs", "--help"]
    done = subprocess.run(begun, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"vl01": "jobs.__main__:main"}


def test_a_working_folder_that_is_gone_is_one_line(vl01, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = vl01("status", "out")
    assert code == ExitCode.STOPPED
    assert err == "vl01: [Errno 2] No such file or directory (--debug shows where)\n"


def test_a_stranger_finds_the_way_from_the_top_level_help(vl01):
    code, out, _ = vl01("--help")
    assert code == 0
    for word in ("vl01 caption photos --output captions", "vl01 verify captions", "Exit codes"):
        assert word in out
    unwrapped = "cannot be read. A run that was stopped goes on where it was when the same"
    assert unwrapped in [line.strip() for line in out.splitlines()]


@pytest.mark.parametrize("command", ["caption", "ocr", "extract", "run", "verify", "quantize"])
def test_every_command_explains_itself(vl01, command):
    code, out, _ = vl01(command, "--help")
    assert code == 0
    assert "Example" in out
    assert "Exit codes" in out


def test_every_key_of_a_job_is_a_flag_with_its_description_and_default(vl01):
    _, out, _ = vl01("caption", "--help")
    words = " ".join(out.replace("│", " ").split())
    for key, field in KEYS.items():
        if key not in ("task", "source", "schema", "ladder"):
            assert f"--{key.replace('_', '-')} " in words
            assert (field.description or "").split(";")[0].split()[0] in words
    assert "[default: 256]" in words
    assert "Describe this image" in words


def test_ocr_brings_its_own_prompt_and_a_budget_for_a_page(vl01, flow):
    assert vl01("ocr", "scans", "--output", "out", "--model", "ckpt")[0] == 0
    job = flow.jobs[0]
    assert (job.task, job.max_new_tokens) == ("ocr", 4096)
    assert "as Markdown" in job.prompt
    assert (job.stop_repetition, job.skip_blank, job.dedupe) == (True, True, "exact")
    assert job.ladder == ladder.PAGE


def test_what_ocr_does_by_itself_can_be_switched_off(vl01, flow):
    off = "--no-stop-repetition", "--no-skip-blank", "--dedupe", "none", "--retries", "0"
    assert vl01("ocr", "scans", "--output", "out", "--model", "ckpt", *off)[0] == 0
    job = flow.jobs[0]
    assert (job.stop_repetition, job.skip_blank) == (False, False)
    assert (job.dedupe, job.retries) == ("none", 0)


def test_flags_arrive_in_the_job(vl01, flow):
    code, _, _ = vl01(
        *CAPTION, "--pp", "2", "--keep", "url", "--keep", "license", "--exif-rotate",
        "--temperature", "0.5", "--cache-gib", "1.5", "--quantization", "none",
    )  # fmt: skip
    assert code == 0
    job = flow.jobs[0]
    assert (job.task, job.pp, job.keep, job.exif_rotate) == ("caption", 2, ("url", "license"), True)
    assert (job.temperature, job.cache_gib, job.quantization) == (0.5, 1.5, "none")
    assert job.stop == ()
    assert job.endpoint_url is None


def test_a_job_file_runs_the_same_job_as_the_flags(vl01, flow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("source: photos\noutput: out\nmodel: ckpt\npp: 4\n")
    assert vl01("run", "job.yaml")[0] == vl01(*CAPTION, "--pp", "4")[0] == 0
    from_file, from_flags = flow.jobs
    assert from_file == from_flags


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["caption"], "Missing argument 'SOURCE': a folder, a glob, or a file"),
        (["caption", "photos", "--output", "out"], "Missing option '--model': a check"),
        ([*CAPTION, "--promt", "x"], "No such option: --promt"),
        ([*CAPTION, "--pp", "0"], "--pp is '0'; it should be greater than or equal to 1"),
        ([*CAPTION, "--pp", "two"], "--pp is 'two'; it should be a valid integer"),
        ([*CAPTION, "--dtype", "int4"], "it should be 'auto', 'float32' or 'bfloat16'"),
        ([*CAPTION, "more"], "unexpected extra argument"),
        (["capton"], "No such command 'capton'. Did you mean 'caption'?"),
        (["run", "nowhere.yaml"], "cannot read nowhere.yaml: No such file or directory"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(vl01, flow, arguments, expected):
    code, out, err = vl01(*arguments)
    assert code == ExitCode.USAGE
    assert err.startswith("vl01: ")
    assert expected in err.splitlines()[0]
    assert "Traceback" not in out + err
    assert flow.jobs == []


def test_a_glob_that_the_shell_filled_in_is_told_without_a_thousand_names(vl01, flow):
    code, _, err = vl01("caption", *(f"photos/{n}.jpg" for n in range(1000)), *CAPTION[2:])
    assert code == ExitCode.USAGE
    assert "(photos/1.jpg photos/2.jpg" in err
    assert "Put a glob in quotes, 'photos/*.jpg'" in err
    assert len(err) < 500


@pytest.mark.parametrize(
    ("answer", "flags", "expected"),
    [
        (Summary("out", 2, {"ok": 5}), [], ExitCode.OK),
        (Summary("out", 2, {"ok": 4, "failed": 1}), [], ExitCode.OK),
        (Summary("out", 2, failed_in_all=1), ["--strict"], ExitCode.STRICT),
        (Summary("out", 2, failed_in_all=0), ["--strict"], ExitCode.OK),
        (EngineError("the replica died six times"), [], ExitCode.STOPPED),
        (CheckpointError("ckpt is no checkpoint"), [], ExitCode.USAGE),
        (KeyboardInterrupt(), [], ExitCode.STOPPED),
        (OSError(28, "No space left on device"), [], ExitCode.STOPPED),
    ],
)
def test_the_exit_code_says_how_a_run_ended(vl01, flow, answer, flags, expected):
    flow.answer = answer
    code, _, err = vl01(*CAPTION, *flags)
    assert code == expected
    assert "Traceback" not in err
    if isinstance(answer, BaseException):
        assert (str(answer) or "the same command goes on") in err


def test_a_strict_run_that_finds_nothing_to_do_says_why_it_fails(vl01, flow):
    flow.answer = Summary("out", 2, failed_in_all=3)
    assert "--strict: 3 rows of OUT have failed; vl01 retry" in vl01(*CAPTION, "--strict")[2]


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_traceback_of_an_error_can_be_had(flow, monkeypatch, how):
    monkeypatch.setenv("VL01_DEBUG", "1" if how == "variable" else "0")
    flow.answer = EngineError("the replica died")
    with pytest.raises(EngineError, match="the replica died"):
        main([*CAPTION, *(["--debug"] if how == "flag" else [])])


def test_the_summary_tells_rows_reasons_tokens_times_and_place(vl01, flow):
    flow.answer = Summary(
        output="/data/captions",
        units=3,
        rows={"ok": 1200, "failed": 2},
        reasons={"decode_error": 1, "empty_file": 1},
        prompt_tokens=2_400_000,
        output_tokens=99_000,
        seconds=60.0,
        stage_seconds={"read": 1.0, "generate": 58.5},
    )
    _, out, _ = vl01(*CAPTION)
    assert "/data/captions (3 units, all committed)" in out
    assert "1,200 ok" in out
    assert "2 failed" in out
    assert "1 decode_error, 1 empty_file" in out
    assert "2,400,000 read, 99,000 written" in out
    assert "60.0 s, 20.03 rows/s" in out
    assert "generate 58.5 s" in out


def test_a_name_is_shown_as_it_is(vl01, flow):
    """Rich would make a picture of :100: and take [b] for a style."""
    flow.answer = EngineError("cannot write /data/:100:/[b]")
    assert vl01(*CAPTION)[2] == "vl01: cannot write /data/:100:/[b]\n"
    flow.answer = Summary("/data/:100:/[b]", units=3)
    assert "/data/:100:/[b] (3 units" in vl01(*CAPTION)[1]


def test_a_run_that_finds_nothing_to_do_says_so(vl01, flow):
    flow.answer = Summary("/data/captions", units=3)
    code, out, _ = vl01(*CAPTION)
    assert code == ExitCode.OK
    assert "nothing was left to do" in out


def test_a_run_says_what_its_source_grew_by(vl01, flow):
    growth = Growth(1, PlanTotals(4, 1055, 0), new_files=1050, changed_files=5, waiting_files=1)
    flow.answer = Summary("/data/captions", units=4, growth=growth)
    _, out, _ = vl01(*CAPTION, "--grow")
    assert "1,050 files new; 5 files changed; 1 file written too recently" in out
    flow.answer = Summary("/data/captions", units=4, growth=Growth(0, PlanTotals(4, 1000, 0)))
    _, out, _ = vl01(*CAPTION, "--grow")
    assert "nothing is new or changed" in out


def test_a_run_with_random_weights_says_that_its_texts_mean_nothing(vl01, flow):
    flow.answer = Summary("out", 1, {"ok": 3}, random_weights=True)
    _, out, _ = vl01(*CAPTION, "--random-weights")
    assert flow.jobs[0].random_weights
    assert "texts mean nothing" in out


def dataset(**found) -> Verification:
    nothing = {
        "outdated_units": 0,
        "missing_rows": 0,
        "doubled_rows": 0,
        "unrecorded_parts": (),
        "damaged_units": 0,
        "problems": (),
    }
    facts = {"planned_units": 2, "committed_units": 2, "rows": 9, "statuses": {"ok": 9}}
    return Verification(**({"output": "/out", "reasons": {}} | facts | nothing | found))


@pytest.mark.parametrize(
    ("verification", "expected", "told"),
    [
        (dataset(), ExitCode.OK, "every row is there, once"),
        (
            dataset(committed_units=1),
            ExitCode.UNACCOUNTED,
            "not finished, 1 unit to do: ",
        ),
        (dataset(outdated_units=3), ExitCode.UNACCOUNTED, "3 units have files that changed since"),
        (dataset(missing_rows=3, problems=("unit 0: cut",)), ExitCode.UNACCOUNTED, "unit 0: cut"),
        (
            dataset(damaged_units=1, problems=("unit 0: cut",)),
            ExitCode.UNACCOUNTED,
            "done again, once its record /out/_vl01/commits/NUMBER.json is deleted",
        ),
    ],
)
def test_verify_does_not_call_a_damaged_dataset_whole(
    vl01, monkeypatch, verification, expected, told
):
    asked = []
    monkeypatch.setattr("pipeline.verify.verify", lambda *a: asked.append(a) or verification)
    code, out, err = vl01("verify", "/out", "--deep", "--endpoint-url", "http://localhost:1")
    assert code == expected
    assert told in out + err
    assert asked == [("/out", "http://localhost:1", True)]


def test_the_version_is_told(vl01):
    code, out, _ = vl01("--version")
    assert code == 0
    assert out.startswith("vl01 0.")


@pytest.mark.parametrize("command", ["caption", "ocr", "extract", "run", "retry", "plan", "submit"])
def test_an_example_of_the_help_can_be_copied_from_a_terminal_of_80_columns(
    vl01, monkeypatch, command
):
    """A line that is broken by the terminal is two commands."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = vl01(command, "--help")[1].splitlines()
    start = next(n for n, line in enumerate(lines) if line.strip().startswith("Example")) + 1
    end = next(n for n, line in enumerate(lines) if n > start and not line.strip())
    assert all(line.startswith("   ") for line in lines[start:end])
