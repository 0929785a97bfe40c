"""How well a checkpoint reads: both sets of held-out pages, as a table and as numbers."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from model.engine.config import EngineConfig
from model.nano.quality import FONTS, Score, ask, held_out_pages, score


def measure(
    config: EngineConfig, pages: int, seed: int, max_new_tokens: int, answers: Path | None = None
) -> dict[str, Score]:
    """The scores of so many pages in each set of fonts. `answers`: a JSONL file, made anew, of
    every answer beside its truth."""
    scores: dict[str, Score] = {}
    told: list[dict[str, Any]] = []
    for fonts, families in FONTS.items():
        answered = ask(config, held_out_pages(pages, families, seed), max_new_tokens)
        scores[fonts] = score(answered)
        told += [{"fonts": fonts, **vars(each)} for each in answered]
    if answers:
        answers.write_text("".join(json.dumps(each) + "\n" for each in told), encoding="utf-8")
    return scores


def show(scores: dict[str, Score]) -> None:
    table = Table("", "pages", "character errors", "fields right", "descriptions right")
    for fonts, each in scores.items():
        table.add_row(
            fonts,
            str(each.pages),
            f"{each.character_errors:.2%}",
            f"{each.fields:.1%}",
            f"{each.descriptions:.1%}",
        )
    Console(highlight=False).print(table)


def as_json(config: EngineConfig, seed: int, scores: dict[str, Score]) -> dict[str, Any]:
    return {
        "settings": {**vars(config), "seed": seed},
        "scores": {fonts: vars(each) for fonts, each in scores.items()},
    }
