"""A schema becomes part of the job, wherever it came from; a wrong one is told before any work."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from jobs import caption, extract
from jobs.config import job_from_file, job_from_flags, job_of_retry
from schemas.errors import ConfigError
from schemas.extraction import load_schema

FLAGS = {"source": "in", "output": "out", "model": "ckpt"}
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "number", "multipleOf": 0.01, "description": "what is paid"}},
    "required": ["total"],
}


@pytest.fixture
def schema_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(SCHEMA, indent=4))
    return path


def refusal(flags: dict, task=extract.TASK) -> str:
    with pytest.raises(ConfigError) as caught:
        job_from_flags(task, FLAGS | flags)
    return str(caught.value)


def test_the_job_holds_the_schema_and_not_its_path(schema_file):
    job = job_from_flags(extract.TASK, FLAGS | {"schema": "policy.json"})
    schema_file.unlink()
    assert json.loads(job.fingerprint("r")["schema"]) == SCHEMA
    asked = job.extraction()
    assert asked
    assert job.sampling().json_schema == asked.json_schema


def test_flags_and_file_make_the_same_job_from_any_folder(schema_file, monkeypatch):
    text = "task: extract\nsource: in\noutput: out\nmodel: ckpt\nschema: $NAME.json\n"
    (schema_file.parent / "job.yaml").write_text(text)
    monkeypatch.setenv("NAME", "policy")
    from_flags = job_from_flags(extract.TASK, FLAGS | {"schema": "policy.json"})
    monkeypatch.chdir("/")
    assert job_from_file(schema_file.parent / "job.yaml") == from_flags


def test_spaces_in_the_file_make_no_other_job_but_the_order_of_fields_does(schema_file):
    job = job_from_flags(extract.TASK, FLAGS | {"schema": "policy.json"})
    schema_file.write_text(json.dumps(SCHEMA))
    assert job_from_flags(extract.TASK, FLAGS | {"schema": "policy.json"}) == job
    schema_file.write_text(json.dumps(dict(reversed(SCHEMA.items()))))
    assert job_from_flags(extract.TASK, FLAGS | {"schema": "policy.json"}) != job


def test_a_retry_and_a_cluster_need_no_file_any_more(schema_file, tmp_path):
    job = job_from_flags(extract.TASK, FLAGS | {"schema": "policy.json"})
    schema_file.unlink()
    stored = json.loads(json.dumps(job.model_dump(mode="json")))
    assert job_of_retry(stored, job.output, {}) == (job, {})
    sent = tmp_path / "sent.yaml"
    sent.write_text(json.dumps(stored))
    assert job_from_file(sent) == job


def test_a_schema_with_references_is_not_searched_for_variables_when_it_is_sent(tmp_path):
    line = {"type": "object", "properties": {"a": {"const": 1}}}
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/l"}}, "$defs": {"l": line}}
    (tmp_path / "job.yaml").write_text(
        json.dumps(FLAGS | {"task": "extract", "schema": json.dumps(schema)})
    )
    assert json.loads(job_from_file(tmp_path / "job.yaml").json_schema or "") == schema


def test_the_prompt_names_the_fields(schema_file):
    flags = FLAGS | {"schema": "policy.json"}
    line = "- total (number with at most 2 decimals): what is paid"
    assert line in job_from_flags(extract.TASK, flags).prompt.splitlines()
    own = job_from_flags(extract.TASK, flags | {"prompt": "Look: {fields}\nNothing else, {x}."})
    assert own.prompt == f"Look: {line}\nNothing else, {{x}}."
    assert job_from_flags(extract.TASK, flags | {"prompt": "Total?"}).prompt == "Total?"


@pytest.mark.parametrize("name", extract.SHIPPED)
def test_a_schema_that_ships_is_usable_by_its_name(name):
    job = job_from_flags(extract.TASK, FLAGS | {"schema": name})
    schema = json.loads(job.json_schema or "")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert load_schema(job.json_schema or "").arrow_type.num_fields == len(schema["properties"])


def test_the_schemas_are_packaged():
    project = tomllib.loads(Path("pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["jobs"] == ["schemas/*.json"]
    names = {path.stem for path in Path("jobs/schemas").iterdir()}
    assert names == set(extract.SHIPPED)


def test_wrong_use_of_a_schema_is_one_line(schema_file):
    assert refusal({}).startswith("--schema is missing: the fields: a JSON Schema file, or")
    assert refusal({"schema": "policy.json"}, caption.TASK) == (
        "--schema is for extract only; the task is caption"
    )
    assert refusal({"schema": "invoce"}) == (
        "cannot read schema invoce: No such file or directory; expected a JSON Schema file, "
        "or one of invoice, receipt, form, table"
    )
    schema_file.write_bytes(b"\xff\xd8\xff")
    assert refusal({"schema": "policy.json"}) == (
        "schema policy.json is not text in UTF-8; expected JSON"
    )
    schema_file.write_text('{"type": "object",')
    assert refusal({"schema": "policy.json"}).startswith("policy.json: the schema is not JSON: ")


def test_every_keyword_that_cannot_be_used_is_a_line_with_its_path(schema_file):
    fields = {"a": {"oneOf": [{"type": "string"}]}, "b": {"type": "string", "format": "email"}}
    schema_file.write_text(json.dumps({"type": "object", "properties": fields}))
    lines = refusal({"schema": "policy.json"}).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["policy.json", "#/properties/a/oneOf"],
        ["policy.json", "#/properties/b/format"],
    ]


def test_a_schema_in_a_job_file_of_another_task_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(FLAGS | {"schema": "invoice"}))
    with pytest.raises(ConfigError, match=r"job\.yaml: schema is for extract only"):
        job_from_file(path)
    path.write_text(json.dumps(FLAGS | {"task": "extract", "schema": {"type": "object"}}))
    with pytest.raises(ConfigError, match="it should be a valid string"):
        job_from_file(path)
