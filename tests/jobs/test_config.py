"""What a user writes becomes the job that he means, or one line that says what is wrong."""

import json
from pathlib import Path

import pytest

from jobs import caption, ladder
from jobs.config import job_from_file, job_from_flags, job_of_retry
from schemas.errors import ConfigError
from schemas.job import Job
from schemas.ladder import Cause, Step

REQUIRED = "source: photos\noutput: out\nmodel: ckpt\n"


def job_file(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        job_from_file(job_file(folder, text))
    return str(caught.value)


@pytest.mark.parametrize("key", ["source", "output", "model"])
def test_an_empty_address_does_not_become_the_working_folder(tmp_path, key):
    """As of `--output "$OUT"` where OUT is not set."""
    lines = [line for line in REQUIRED.splitlines() if not line.startswith(key)]
    message = refusal(tmp_path, "\n".join([*lines, f"{key}: ''"]))
    assert message.endswith(f"{key} is ''; it should have at least 1 character")


def test_a_misspelt_key_is_not_ignored(tmp_path):
    message = refusal(tmp_path, REQUIRED + "max_new_token: 5\n")
    assert message == (
        f"{tmp_path}/job.yaml: unknown key 'max_new_token'; did you mean 'max_new_tokens'?"
    )


def test_a_flag_written_as_a_key_is_recognised(tmp_path):
    assert "did you mean 'max_pixels'?" in refusal(tmp_path, REQUIRED + "max-pixels: 5\n")


def test_a_key_like_no_other_lists_the_known_ones(tmp_path):
    message = refusal(tmp_path, REQUIRED + "zzz: 5\n")
    assert "unknown key 'zzz'; known are task, source, output" in message


def test_every_mistake_is_named_in_a_line_of_its_own(tmp_path):
    lines = refusal(tmp_path, "source: a\nmodel: m\npp: 0\nkeep: url\n").splitlines()
    assert [line.removeprefix(f"{tmp_path}/job.yaml: ") for line in lines] == [
        "output is missing: the folder of the dataset that is written",
        "keep is 'url'; it should be a list: [url]",
        "pp is 0; it should be greater than or equal to 1",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pp: two", "pp is 'two'; it should be a valid integer"),
        ("pp: 1.5", "pp is 1.5; it should be a valid integer"),
        ("replicas: all", "replicas is 'all'; it should be a whole number from 1 on, or auto"),
        ("replicas: 0", "replicas is 0; it should be a whole number from 1 on, or auto"),
        ("prompt: 7", "prompt is 7; it should be a valid string"),
        ("prompt: ''", "prompt is ''; it should have at least 1 character"),
        ("keep:", "keep is None; it should be a list: []"),
        ("stop: [a, 7]", "stop[1] is 7; it should be a valid string"),
        ("quantization: 4", "quantization is 4; it should be 'int8', 'int8-dynamic' or 'none'"),
        ("strict: perhaps", "strict is 'perhaps'; it should be a valid boolean"),
        ("top_p: 0", "top_p is 0; it should be greater than 0"),
        ("task: capton", "task is 'capton'; it should be 'caption', 'ocr' or 'extract'"),
        ("source: other", "source is given twice"),
    ],
)
def test_a_wrong_value_is_one_clear_line(tmp_path, line, expected):
    assert refusal(tmp_path, REQUIRED + line) == f"{tmp_path}/job.yaml: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "holds no job"),
        ("", "holds no job"),
        ("just words", "holds no job"),
        ("source: [a\n", "line 2 is not YAML"),
        ("source: a\n\tpp: 2\n", "line 2 is not YAML"),
        ("output: 2024-13-45\n", "holds a value that is none: month must be in 1..12"),
    ],
)
def test_a_file_that_is_no_job_is_refused_by_name(tmp_path, text, expected):
    message = refusal(tmp_path, text)
    assert expected in message
    assert str(tmp_path / "job.yaml") in message
    assert "\n" not in message


def test_a_job_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        job_from_file(tmp_path / "none.yaml")


def test_a_job_file_that_is_a_photograph_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        job_from_file(path)


def test_a_job_file_means_the_same_from_any_folder(tmp_path, monkeypatch):
    path = job_file(tmp_path, REQUIRED)
    job = job_from_file(path)
    assert job.source == str(tmp_path / "photos")
    monkeypatch.chdir(tmp_path.parent)
    assert job_from_file(Path(tmp_path.name) / "job.yaml") == job


def test_home_and_variables_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DAY", "2024-05-01")
    job = job_from_file(
        job_file(tmp_path, "source: s3://photos/$DAY\noutput: ~/${DAY}\nmodel: ../ckpt\n")
    )
    assert job.source == "s3://photos/2024-05-01"
    assert job.output == "/home/ada/2024-05-01"
    assert job.model == str(tmp_path.parent / "ckpt")


def test_the_home_of_nobody_is_a_path_that_is_not_there(tmp_path):
    job = job_from_file(job_file(tmp_path, REQUIRED.replace("photos", "~nobody-here/photos")))
    assert job.source == str(tmp_path / "~nobody-here" / "photos")


def test_a_variable_that_is_not_set_does_not_become_a_folder_name(tmp_path, monkeypatch):
    monkeypatch.delenv("DAY", raising=False)
    message = refusal(tmp_path, "source: photos\noutput: out/$DAY\nmodel: ckpt\n")
    assert "output is 'out/$DAY', but $DAY is not set" in message


def test_a_prompt_is_not_searched_for_variables(tmp_path):
    job = job_from_file(job_file(tmp_path, REQUIRED + "prompt: What costs $5 here?\n"))
    assert job.prompt == "What costs $5 here?"


def test_flags_and_file_make_the_same_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"source": "photos", "output": "out", "model": "ckpt", "pp": "2", "keep": ["url"]}
    from_flags = job_from_flags(caption.TASK, values)
    from_file = job_from_file(job_file(tmp_path, REQUIRED + "pp: 2\nkeep: [url]\n"))
    assert from_flags == from_file
    assert from_flags.prompt == caption.TASK.defaults["prompt"]


def test_a_mistake_in_flags_is_told_in_flags():
    with pytest.raises(ConfigError) as caught:
        job_from_flags(caption.TASK, {"output": "out", "model": "ckpt", "max_pixels": "0"})
    assert str(caught.value).splitlines() == [
        "SOURCE is missing: a folder, a glob, or a file: an image, .pdf, .tif, .tar, .parquet, or "
        "a list of addresses in a .txt, .csv or .jsonl",
        "--max-pixels is '0'; it should be greater than or equal to 1",
    ]


LADDER = """\
ladder:
  - {when: [repetition, invalid], temperature: 0.7}
  - {when: [unsure], unsure_below: -0.5, turn: 90}
"""


def test_a_file_brings_its_own_ladder_and_a_task_brings_one_otherwise(tmp_path):
    own = job_from_file(job_file(tmp_path, REQUIRED + "task: ocr\n" + LADDER))
    assert own.ladder == (
        Step(when=(Cause.REPETITION, Cause.INVALID), temperature=0.7),
        Step(when=(Cause.UNSURE,), unsure_below=-0.5, turn=90),
    )
    assert job_from_file(job_file(tmp_path, REQUIRED + "task: ocr\n")).ladder == ladder.PAGE
    assert job_from_file(job_file(tmp_path, REQUIRED)).ladder == ()


def test_how_many_replicas_there_are_is_no_part_of_what_a_job_writes(tmp_path):
    auto, two = (
        job_from_file(job_file(tmp_path, f"{REQUIRED}replicas: {replicas}"))
        for replicas in ("auto", "2")
    )
    assert (auto.replicas, two.replicas) == ("auto", 2)
    assert auto.fingerprint("r") == two.fingerprint("r")
    stored = json.loads(auto.model_dump_json())
    assert Job.model_validate(stored) == auto


def test_the_ladder_is_part_of_the_fingerprint_and_survives_being_stored(tmp_path):
    one = job_from_file(job_file(tmp_path, REQUIRED + LADDER))
    none = job_from_file(job_file(tmp_path, REQUIRED))
    assert one.fingerprint("r") != none.fingerprint("r")
    stored = json.loads(json.dumps(one.model_dump(mode="json")))
    assert job_of_retry(stored, one.output, {}) == (one, {})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ladder: [{when: [repetitoin]}]", "ladder[0].when[0] is 'repetitoin'; it should be"),
        ("ladder: [{turn: 90}]", "ladder[0].when is missing"),
        ("ladder: [{when: [], turn: 90}]", "ladder[0].when is []; it should have at least 1"),
        (
            "ladder: [{when: [empty], trun: 90}]",
            "ladder[0].trun is not known; did you mean 'turn'?",
        ),
        ("ladder: [{when: [empty], turn: 45}]", "ladder[0].turn is 45; it should be 90, 180 or"),
        ("retries: -1", "retries is -1; it should be greater than or equal to 0"),
        ("dedupe: yes", "dedupe is True; it should be 'exact' or 'none'"),
    ],
)
def test_a_wrong_ladder_is_one_clear_line(tmp_path, line, expected):
    refused = refusal(tmp_path, REQUIRED + line)
    assert f"{tmp_path}/job.yaml: {expected}" in refused
    if "trun" not in line:
        assert len(refused.splitlines()) == 1
