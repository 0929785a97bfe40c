"""The commonest mistakes are told at once: before torch and Ray are imported, with what to do."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.nano.random_checkpoint import write_random_checkpoint
from pipeline.early import check, stored_job
from schemas.errors import ConfigError
from schemas.job import Job
from tests.pipeline.fake_run import job_of, run, write_images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), tile=56)


@pytest.fixture
def job(tmp_path, checkpoint) -> Job:
    write_images(tmp_path / "in", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    return job_of(tmp_path / "in", tmp_path / "out").model_copy(update={"model": str(checkpoint)})


def test_a_job_without_mistakes_passes_and_leaves_nothing_behind(job, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    check(job)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"source": "{tmp}/nowhere"}, "does not exist; expected a folder, a glob, or a file"),
        ({"source": "{tmp}/empty"}, "nothing to read in .*; expected files ending in"),
        ({"output": "{tmp}/file"}, "it is a file, not a folder"),
        ({"output": "/proc/out"}, "cannot write to /proc/out"),
        ({"output": "memory://out"}, "memory:///out: it is gone when this command ends"),
        (
            {"model": "{tmp}/nowhere"},
            "has no config\\.json. Expected the folder of a MiniMax-VL-01",
        ),
        ({"pp": 9}, "--pp is 9, and .* has 8 layers.*: expected 1 to 8"),
    ],
)
def test_a_mistake_is_told_with_what_was_expected(job, tmp_path, wrong, says):
    filled = {
        key: value.format(tmp=tmp_path) if isinstance(value, str) else value
        for key, value in wrong.items()
    }
    with pytest.raises(ConfigError, match=says):
        check(job.model_copy(update=filled))


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("model-00002-of-00005.safetensors", "model-00002.* is missing, 1 of 5 shards in all"),
        ("model.safetensors.index.json", "has no model.safetensors.index.json. Expected"),
        ("tokenizer.json", "has no tokenizer.json; copy it there"),
        ("tokenizer_config.json", "has no chat template; expected `chat_template` in"),
        ("preprocessor_config.json", "has no preprocessor_config.json"),
    ],
)
def test_a_file_that_the_model_lacks_is_told(job, tmp_path, missing, says):
    model = tmp_path / "model"
    shutil.copytree(job.model, model)
    (model / missing).unlink()
    job = job.model_copy(update={"model": str(model)})
    with pytest.raises(ConfigError, match=says):
        check(job)
    if "safetensors" in missing:
        check(job.model_copy(update={"random_weights": True}))


class NoCredentialsError(Exception):
    """As botocore's, by its name."""


def test_a_model_in_a_bucket_without_credentials_is_not_asked_for_again_and_again(job, monkeypatch):
    asked = []

    def deny(*_args, **_options):
        asked.append(1)
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.exists", deny)
    with pytest.raises(ConfigError, match=r"\(--model\): Unable .*AWS_ACCESS_KEY_ID"):
        check(job.model_copy(update={"model": "memory://bucket/model"}))
    assert len(asked) == 1


def test_the_job_of_an_output_that_holds_none_is_refused(tmp_path, job):
    with pytest.raises(ConfigError, match=r"no _vl01/job\.json there; expected the output of"):
        stored_job(str(tmp_path / "nowhere"))
    run(job)
    assert stored_job(job.output)["source"] == job.source


def test_the_checks_import_nothing_that_takes_seconds():
    heavy = "{'torch', 'ray', 'transformers'} & set(sys.modules)"
    code = f"import sys, jobs.cli, pipeline.early; print(sorted({heavy}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
