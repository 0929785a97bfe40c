"""A time that is foretold says which measurement it comes from, and takes one that fits the job."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.bench.ceilings import Ceilings
from jobs.bench.report import as_json
from jobs.bench.slice import Measurement, SliceSettings
from jobs.bench.workloads import WORKLOADS
from model.config import TextConfig, load_config
from model.nano.random_checkpoint import RELEASED_SIZES, write_configuration
from pipeline import lease
from pipeline.estimate.measured import TABLE
from pipeline.estimate.throughput import _of_runs, find_throughput, time_estimate
from pipeline.ledger import Ledger
from pipeline.report import write_report
from schemas.errors import ConfigError
from schemas.estimate import Assumptions, Throughput
from schemas.job import Job
from schemas.report import Foretold, Hardware, RunRecord
from tests.pipeline.fake_run import job_of, run, write_images


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextConfig:
    folder = tmp_path_factory.mktemp("released")
    write_configuration(folder, RELEASED_SIZES)
    return load_config(folder).text


def found(job: Job, text: TextConfig, prompt: float = 2400, **assumed) -> Throughput | None:
    return find_throughput(job, text, None, Assumptions(**assumed), prompt)


def job(**keys) -> Job:
    return job_of("/in", "/out", **({"max_new_tokens": 128} | keys))


def bench_file(tmp_path: Path, **settings) -> Path:
    """What `vl01 bench slice --json` writes, with round numbers: 128 images in 10 seconds."""
    measured = [
        Measurement(WORKLOADS["coco640x480"], 10.0, (10.0,), 1, 1.0, None, 0),
        Measurement(WORKLOADS["decode"], 5.0, (5.0,), 1, 1.0, None, 0),
    ]
    numbers = as_json(SliceSettings(**settings), torch.device("cpu"), Ceilings(1, 1), measured)
    path = tmp_path / "slice.json"
    path.write_text(json.dumps(numbers | {"device": "NVIDIA L40S"}))
    return path


def test_without_a_run_the_table_of_the_project_tells_the_speed_of_the_released_model(text):
    told = found(job(pp=4, replicas=2), text)
    assert told is not None
    # What a tenth of the network does in a second, each of the 8 GPUs of the whole does in ten.
    slice_images_per_second = 128 / TABLE[0].workloads[0].seconds
    assert told.tokens_per_second / (2400 + 128) == pytest.approx(8 * slice_images_per_second / 10)
    assert (told.gpus, told.output_tokens) == (8, 128)
    assert "table" in told.origin
    assert "H100" in told.origin
    assert "coco640x480" in told.origin
    page = found(job(), text, prompt=8000)
    assert page is not None
    assert "page-a4" in page.origin


def test_as_many_replicas_as_fit_count_as_one_where_no_run_tells_more(text):
    one, auto = found(job(pp=4), text), found(job(pp=4, replicas="auto"), text)
    assert one is not None
    assert auto is not None
    assert auto == replace(one, origin=auto.origin)
    assert "as if --replicas auto were 1" in auto.origin
    asked = found(job(pp=4, replicas="auto"), text, tokens_per_second=1000)
    assert asked is not None
    assert asked.gpus == 4
    assert "as if --replicas auto were 1" in asked.origin
    hardware = Hardware("cuda", 4, 3, 1)
    run = RunRecord("run", "", "", 100.0, {"ok": 10}, 1000, 200, {}, hardware, start_seconds=60.0)
    told = _of_runs(job(pp=4, replicas="auto"), [run], "here")
    assert told is not None
    assert (told.gpus, "auto" in told.origin) == (12, False)
    assert _of_runs(job(pp=4, replicas=2), [run], "here") is None


@pytest.mark.parametrize("keys", [{"device": "cpu"}, {"quantization": "none"}])
def test_the_table_is_silent_about_what_it_did_not_measure(text, keys):
    assert found(job(**keys), text) is None


def test_a_retry_with_longer_answers_does_not_tell_the_length_of_those_of_the_job():
    hardware = Hardware("cpu", 1, 1, 1)
    plain = RunRecord("1", "", "", 100.0, {"ok": 10}, 1000, 200, {}, hardware)
    retry = replace(
        plain, run="2", what="retry", output_tokens=9000, changed={"max_new_tokens": 900}
    )
    told = _of_runs(job(device="cpu"), [plain, retry], "")
    assert told is not None
    assert told.output_tokens == 20


def test_a_bench_of_this_machine_is_taken_for_the_whole_network(text, tmp_path):
    path = bench_file(tmp_path)
    told = found(job(pp=4), text, bench=str(path))
    assert told is not None
    assert told.tokens_per_second == pytest.approx(128 * (2400 + 128) / 10 / 10 * 4)
    assert str(path) in told.origin
    assert "NVIDIA L40S" in told.origin
    assert "as if every answer had --max-new-tokens" in told.origin
    short = found(job(), text, prompt=100, bench=str(path))
    assert short is not None
    assert "workload decode" in short.origin
    said = found(job(), text, bench=str(path), tokens_per_second=7.0)
    assert said is not None
    assert said.tokens_per_second == 7


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width": "tiny"}, "--width tiny; expected released"),
        ({"quantization": "int8-dynamic"}, "--quantization int8-dynamic; the job has int8"),
    ],
)
def test_a_bench_of_something_else_is_refused(text, tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        found(job(), text, bench=str(bench_file(tmp_path, **settings)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read --bench"),
        ("{", "is not JSON"),
        ("[]", "holds no object"),
        ('{"workloads": [], "settings": {}}', "lacks 'width'"),
        ("{}", r"--bench .* no report of this version.*expected the JSON of vl01 bench"),
        ('{"runs": []}', "tells of no run with --pp 1"),
    ],
)
def test_a_file_that_tells_no_speed_is_one_clear_line(text, tmp_path, content, says):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        found(job(), text, bench=str(path))


def test_the_report_of_another_output_tells_the_speed_and_what_was_foretold(
    text, tmp_path, monkeypatch
):
    monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
    write_images(tmp_path / "in", 8)
    ledger = run(job_of(tmp_path / "in", tmp_path / "out"))
    write_run(ledger, ledger.record(0).run, seconds=10.0, tokens=1000, copied=36)
    write_run(ledger, "29990101T000000Z-short", seconds=10.0, tokens=10)
    report = write_report(ledger.output).report
    long, _ = report.runs
    assert long.foretold == Foretold(8, 0, 40, 900, True, 9.0, rank_busy=(1.0, 0.97))
    page = Path(ledger.output, "_vl01/report.html").read_text()
    assert "Foretold and measured" in page
    assert long.rank_busy == (0.9, 0.8)
    assert '>Rank 1 busy</td><td class="n">at most 97%</td><td class="n">80%</td>' in page
    told = found(job(device="cpu"), text, bench=f"{ledger.output}/_vl01/report.json")
    assert told is not None
    # Of the rows and tokens in the commit records: 8 rows of 10 + 2 tokens, but for the copied.
    assert (told.tokens_per_second, told.output_tokens) == (5 * 12 / 10, 2)
    assert report.tokens_per_second == 5 * 12 / 20


def write_run(ledger: Ledger, name: str, seconds: float, tokens: int, copied: int = 0) -> None:
    record = RunRecord(
        run=name,
        started_at="",
        finished_at="",
        seconds=seconds,
        rows={"ok": 8},
        prompt_tokens=tokens,
        output_tokens=0,
        stage_seconds={},
        hardware=Hardware("cpu", 1, 1, 1),
        tiles=41,
        foretold=Foretold(8, 0, 40, 900, True, 9.0, rank_busy=(1.0, 0.97)),
        rank_busy=(0.9, 0.8),
        copied_tokens=copied,
    )
    ledger.write_run(record)


@pytest.mark.parametrize(
    ("start", "pace", "seconds"),
    [(60.0, 1200 / 40, 60 + 2400 / 30), (90.0, 1200 / 100, 2400 / 12)],
)
def test_the_start_of_a_run_is_counted_once_unless_it_was_most_of_it(start, pace, seconds):
    record = RunRecord(
        *("run", "", "", 100.0, {"ok": 10}, 1000, 200, {}, Hardware("cpu", 1, 1, 1)),
        start_seconds=start,
    )
    told = _of_runs(job(device="cpu"), [record], "here")
    assert told is not None
    assert told.tokens_per_second == pace
    assert time_estimate(told, 2000, 20, None).seconds == pytest.approx(seconds)
