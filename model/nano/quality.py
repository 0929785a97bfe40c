"""How well a checkpoint reads: pages nobody trained on, asked of the engine, held to the truth."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from model.config import load_config
from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.inputs.images import prepare_image
from model.nano.batches import LANDSCAPE, PORTRAIT, RECEIPT, SLIP
from model.nano.faults import Fault
from model.nano.pages.fonts import ALWAYS_THERE, HELD_OUT, Family, family
from model.nano.pages.page import Page, make_page
from model.nano.tasks import answers, prompts
from model.tokenizer import Tokenizer
from schemas.errors import ConfigError
from schemas.requests import Request, Sampling

NO_SCHEMAS: Mapping[str, str] = {}
_FORMS = (SLIP, RECEIPT, RECEIPT, PORTRAIT, PORTRAIT, LANDSCAPE)

# Of the fonts that are everywhere; the last one is in no page of training.
FONTS = {
    "training fonts": tuple(family(name) for name in ALWAYS_THERE),
    "held-out font": (family(HELD_OUT),),
}


@dataclass(frozen=True)
class Score:
    """Of one set of pages. character_errors: edits a character of the truth, over all pages.
    fields: the share of fields that are exactly right. held_fields: of those in answers that were
    held to their JSON Schema. descriptions: of sentences, likewise."""

    pages: int
    character_errors: float
    fields: float
    held_fields: float
    descriptions: float


@dataclass(frozen=True)
class Answered:
    """One question: the page's number, what was asked, what it says, what the model wrote.
    held: to the JSON Schema of the task."""

    page: int
    task: str
    truth: str
    answer: str
    held: bool = False

    @property
    def is_extract(self) -> bool:
        return self.task.startswith("extract")


def held_out_pages(count: int, families: Sequence[Family], seed: int = 0) -> list[Page]:
    """Of all kinds and sizes; their text is drawn from a stream that training never sees."""
    pages = []
    for number in range(count):
        random = Random(f"held out/{seed}/size/{number}")
        form = _FORMS[number % len(_FORMS)]
        size = random.randint(*form.width), random.randint(*form.height)
        page_seed = f"held out/{seed}/{number}"
        pages.append(make_page(page_seed, *size, kinds=form.kinds, families=families))
    return pages


def png(page: Page) -> bytes:
    buffer = io.BytesIO()
    page.image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(
    config: EngineConfig,
    pages: Sequence[Page],
    max_new_tokens: int = 1024,
    fault: Fault | None = None,
    json_schemas: Mapping[str, str] = NO_SCHEMAS,
) -> list[Answered]:
    """Everything that can be asked of the pages, of one engine, greedily; tasks with a JSON Schema
    twice, free and held to it. fault: is done to its layers first. Raises ConfigError for a fault
    to several ranks, which are other processes."""
    pinpoints = load_config(config.checkpoint).pinpoints
    tokenizer = Tokenizer.from_checkpoint(config.checkpoint)
    templates = {task: tokenizer.prompt_template(text) for task, text in prompts().items()}
    requests, questions = [], {}
    for number, page in enumerate(pages):
        cut = prepare_image(png(page), pinpoints)
        for task, truth in answers(page.content).items():
            ids = templates[task].fill(cut.layout.tokens)
            for schema in (None, json_schemas[task]) if task in json_schemas else (None,):
                key = f"{len(requests)}"
                questions[key] = Answered(number, task, truth.text, "", held=schema is not None)
                sampling = Sampling(max_new_tokens=max_new_tokens, json_schema=schema)
                requests.append(Request(key, ids, cut.tiles, (cut.width, cut.height), sampling))
    if fault and config.ranks > 1:
        raise ConfigError(f"a fault goes into layers of this process: 1 rank, not {config.ranks}")
    with Engine(config) as engine:
        if fault:
            assert engine.decoder is not None
            fault(engine.decoder)
        texts = {result.id: result.text for result in engine.generate(requests)}
    return [replace(question, answer=texts[key]) for key, question in questions.items()]


def score(answered: Sequence[Answered]) -> Score:
    """Raises ValueError when nothing was asked."""
    if not answered:
        raise ValueError("no answers to score; expected at least one page")
    read = [a for a in answered if a.task == "read"]
    errors = sum(edits(a.truth, a.answer) for a in read)
    extracted = [(a.held, fields_right(a.truth, a.answer)) for a in answered if a.is_extract]
    described = [a.truth == a.answer for a in answered if a.task == "describe"]
    return Score(
        pages=len(read),
        character_errors=errors / max(1, sum(len(a.truth) for a in read)),
        fields=_share(fields for held, fields in extracted if not held),
        held_fields=_share(fields for held, fields in extracted if held),
        descriptions=_share((int(right), 1) for right in described),
    )


def _share(counts: Iterable[tuple[int, int]]) -> float:
    counts = list(counts)
    return sum(right for right, _ in counts) / max(1, sum(all_ for _, all_ in counts))


def edits(truth: str, answer: str) -> int:
    """Least number of characters to put in, take out or change (Levenshtein)."""
    row = list(range(len(answer) + 1))
    for i, expected in enumerate(truth, 1):
        before, row[0] = row[0], i
        for j, found in enumerate(answer, 1):
            change = before + (expected != found)
            before = row[j]
            row[j] = min(change, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def fields_right(truth: str, answer: str) -> tuple[int, int]:
    """(fields that are right, all fields); a line item that is not there has none right."""
    expected = _leaves(json.loads(truth))
    try:
        found = _leaves(json.loads(answer))
    except ValueError:
        found = {}
    right = sum(path in found and found[path] == value for path, value in expected.items())
    return right, len(expected)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = ((str(i), item) for i, item in enumerate(value))
    else:
        return {path: value}
    return {k: v for name, part in parts for k, v in _leaves(part, f"{path}/{name}").items()}
