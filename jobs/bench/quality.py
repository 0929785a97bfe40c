"""How well a checkpoint reads: held-out pages, by one setting of the engine or by several."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from jobs import extract
from model.config import load_config
from model.engine.config import EngineConfig
from model.nano.answer_loss import AnswerLoss, answer_loss
from model.nano.faults import FAULTS, Fault
from model.nano.quality import FONTS, Answered, Score, ask, held_out_pages, score
from model.nano.tasks import prompts
from schemas.extraction import load_schema

SHORT_CHUNKS = 128  # tokens: the shortest that the engine takes


@dataclass(frozen=True)
class Setting:
    """What is measured: an engine, and a mistake in it."""

    name: str
    config: EngineConfig
    fault: Fault | None = None


@dataclass(frozen=True)
class Asked:
    """pages: in each set of fonts."""

    pages: int
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class Measured:
    setting: Setting
    fonts: str
    score: Score
    loss: AnswerLoss
    answers: list[Answered]


def settings(config: EngineConfig, compare: str) -> list[Setting]:
    """`config`, and what it is compared with: "nothing", other "settings", "faults", or "all"."""
    chosen = [Setting(_said(config), config)]
    if compare in ("settings", "all"):
        others = [each for each in _others(config) if each != config]
        chosen += [Setting(_said(each), each) for each in others]
    if compare in ("faults", "all"):
        alone = replace(config, ranks=1)
        chosen += [Setting(f"{name} (on purpose)", alone, fault) for name, fault in FAULTS.items()]
    return chosen


def _others(config: EngineConfig) -> Iterator[EngineConfig]:
    """One thing another way in each, as far as this machine can and the checkpoint allows."""
    plain = load_config(config.checkpoint)
    yield replace(config, quantization="int8")
    yield replace(config, chunk_tokens=SHORT_CHUNKS)
    gpus = torch.cuda.device_count()
    if plain.text.num_layers >= 4 and (not config.on_cuda or gpus >= 4):
        yield replace(config, ranks=4)
    if gpus:
        yield replace(config, device="cpu" if config.on_cuda else "cuda")


def _said(config: EngineConfig) -> str:
    device = "GPU" if config.on_cuda else "CPU"
    dtype = str(config.torch_dtype).removeprefix("torch.")
    weights = "" if config.quantization == "none" else f", {config.quantization}"
    ranks = "1 rank" if config.ranks == 1 else f"{config.ranks} ranks"
    return f"{device}, {dtype}{weights}, {ranks}, chunks of {config.chunk_tokens:,}"


def measure(chosen: Iterable[Setting], asked: Asked) -> Iterator[Measured]:
    """Each setting with each set of fonts, as they are done."""
    pages = {
        fonts: held_out_pages(asked.pages, families, asked.seed)
        for fonts, families in FONTS.items()
    }
    schemas = json_schemas()
    for setting in chosen:
        for fonts, drawn in pages.items():
            answered = ask(setting.config, drawn, asked.max_new_tokens, setting.fault, schemas)
            loss = answer_loss(setting.config, drawn, setting.fault)
            yield Measured(setting, fonts, score(answered), loss, answered)


def json_schemas() -> dict[str, str]:
    """What `vl01 extract` holds its answers to."""
    schemas = {}
    for task in prompts():
        if (name := task.removeprefix("extract ")) != task:
            asked = extract.complete({"schema": name, "prompt": ""}, Path())
            schemas[task] = load_schema(asked["schema"]).json_schema
    return schemas


def table(measured: Iterable[Measured]) -> Table:
    """In Markdown, for people and for files."""
    headings = (
        "setting", "fonts", "pages", "characters wrong", "fields right", "fields right, free",
        "descriptions right",
        "nats a token of the truth", "tokens wrong, given those before",
    )  # fmt: skip
    drawn = Table(*headings, box=MARKDOWN)
    for each in measured:
        drawn.add_row(
            each.setting.name,
            each.fonts,
            str(each.score.pages),
            f"{each.score.character_errors:.2%}",
            f"{each.score.held_fields:.1%}",
            f"{each.score.fields:.1%}",
            f"{each.score.descriptions:.1%}",
            f"{each.loss.nats:.4f}",
            f"{each.loss.wrong:.2%}",
        )
    return drawn


def show(measured: Iterable[Measured]) -> None:
    """As wide as it is: a line that is broken is no Markdown."""
    Console(highlight=False, width=240).print(table(measured))


def write_answers(measured: Iterable[Measured], file: Path) -> None:
    """JSONL, every answer beside its truth."""
    told = [
        {"setting": each.setting.name, "fonts": each.fonts, **vars(answer)}
        for each in measured
        for answer in each.answers
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in told), encoding="utf-8")


def as_json(measured: Iterable[Measured], asked: Asked) -> dict[str, Any]:
    scores = [
        {
            "setting": each.setting.name,
            "engine": vars(each.setting.config),
            "fonts": each.fonts,
            **vars(each.score),
            "answer_loss": asdict(each.loss),
        }
        for each in measured
    ]
    return {"asked": vars(asked), "scores": scores}
