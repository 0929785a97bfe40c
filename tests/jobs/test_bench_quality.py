"""`vl01 bench quality`, whole, on a checkpoint that cannot read."""

import json

import pytest

from jobs import cli
from jobs.bench import quality
from model.engine.config import EngineConfig
from model.nano.faults import FAULTS
from model.nano.random_checkpoint import write_random_checkpoint
from model.nano.tasks import prompts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(
        tmp_path_factory.mktemp("random"), hidden_size=32, heads=2, head_dim=16, experts=2,
        intermediate_size=32, vision_layers=1, vision_hidden_size=32,
        vision_intermediate_size=32, pinpoints=[(336, 336)],
    )  # fmt: skip


def test_a_checkpoint_that_cannot_read_gets_no_marks(checkpoint, tmp_path, capsys):
    numbers, answers = tmp_path / "numbers.json", tmp_path / "answers.jsonl"
    asked = f"bench quality --model {checkpoint} --pages 2 --device cpu --max-new-tokens 4"
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked.split(), "--json", str(numbers), "--answers", str(answers)])
    assert not ended.value.code
    header, line, *rows = capsys.readouterr().out.strip().splitlines()
    assert set(line) == set("|-")
    assert {row.count("|") for row in rows} == {header.count("|")}
    scores = json.loads(numbers.read_text())["scores"]
    assert [each["fonts"] for each in scores] == ["training fonts", "held-out font"]
    for each, row in zip(scores, rows, strict=True):
        assert f"{each['answer_loss']['nats']:.4f}" in row
        assert each["pages"] == 2
        assert each["answer_loss"]["nats"] > 3
        assert each["character_errors"] > 0.5
        assert each["fields"] == each["held_fields"] == each["descriptions"] == 0
    told = [json.loads(line) for line in answers.open()]
    assert {each["task"] for each in told} <= set(prompts())
    assert all(each["truth"] for each in told)


def test_what_is_compared_differs_in_one_thing(checkpoint):
    asked = EngineConfig(str(checkpoint), device="cpu", quantization="none")
    alone = quality.settings(asked, "nothing")
    assert [each.config for each in alone] == [asked]
    others = {each.name: each for each in quality.settings(asked, "all")}
    assert len(others) == len(quality.settings(asked, "settings")) + len(FAULTS)
    differing = [
        [key for key, value in vars(asked).items() if vars(each.config)[key] != value]
        for each in others.values()
        if not each.fault
    ]
    assert differing[:4] == [[], ["quantization"], ["chunk_tokens"], ["ranks"]]
    assert {each.fault for each in others.values()} == {None, *FAULTS.values()}


def test_the_model_is_asked_what_the_jobs_ask():
    """It was trained on these words; a prompt that changes needs another training."""
    from pathlib import Path

    from jobs import caption, extract, ocr

    asked = {"describe": caption.TASK.defaults["prompt"], "read": ocr.TASK.defaults["prompt"]}
    for schema in ("receipt", "invoice"):
        values = {"schema": schema, "prompt": extract.TASK.defaults["prompt"]}
        asked[f"extract {schema}"] = extract.complete(values, Path())["prompt"]
    assert prompts() == asked
