"""What the small model is asked, and the tokens it shall answer with. Knows no torch.

The prompts are those of `vl01 caption`, `vl01 ocr` and `vl01 extract`; a test of the jobs keeps
this copy equal to them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from model.nano.pages.content import Content, Fact
from model.nano.pages.marked import NOWHERE, Marked, join, marked
from model.nano.tokenizer import END, Tokens

_PROMPTS = Path(__file__).with_name("prompts.json")
_TOKENS = Path(__file__).with_name("tokens.json")

# Fields that JSON writes as numbers.
_NUMBERS = {"total", "subtotal", "tax", "quantity", "unit_price", "amount"}

# Names of fields, in order, and the fields inside them.
Shape = dict[str, "Shape"]


def prompts() -> dict[str, str]:
    """describe, read, and one for each schema: "extract receipt", "extract invoice"."""
    return json.loads(_PROMPTS.read_text(encoding="utf-8"))


def schemas() -> dict[str, Shape]:
    """The fields that each extract prompt asks for, in the order of the answer."""
    party = {"name": {}, "address": {}, "tax_number": {}}
    item = {"name": {}, "quantity": {}, "amount": {}}
    line = {"description": {}, "quantity": {}, "unit_price": {}, "amount": {}}
    receipt = "merchant address date time currency items tax tip total payment"
    invoice = (
        "invoice_number invoice_date due_date order_number seller buyer currency lines subtotal "
        "tax total iban"
    )
    inner = {"seller": party, "buyer": party, "items": item, "lines": line}
    return {
        f"extract {kind}": {name: inner.get(name, {}) for name in names.split()}
        for kind, names in (("receipt", receipt), ("invoice", invoice))
    }


def tokens() -> Tokens:
    """Symbols and accents of several bytes; and as phrases the lines of all prompts, the headers of
    turns, and the keys of JSON: so an answer is tokenized in one way alone, also where a grammar
    forces its keys. A trained checkpoint knows their ids: add some, but never change any."""
    return Tokens(**json.loads(_TOKENS.read_text(encoding="utf-8")))


def answers(content: Content) -> dict[str, Marked]:
    """The answer to every prompt that can be asked of a page."""
    found = {"read": content.markdown, "describe": content.description}
    if content.facts:
        task = f"extract {content.kind}"
        found[task] = to_json(dict(content.facts), schemas()[task])
    return found


def to_json(fact: Fact, shape: Shape, name: str = "") -> Marked:
    """Compact JSON, its keys in the order of the schema, that keeps the places of its values."""
    if fact is None:
        return marked("null")
    if isinstance(fact, Marked):
        return fact if name in _NUMBERS else '"' + fact + '"'
    if isinstance(fact, Sequence):
        return "[" + join(",", (to_json(item, shape) for item in fact)) + "]"
    fields = (f'"{key}":' + to_json(fact[key], inner, key) for key, inner in shape.items())
    return "{" + join(",", fields) + "}"


@dataclass(frozen=True)
class Encoded:
    """token_ids, and the glyph each one shows (NOWHERE for most of the syntax): int32 [T] each."""

    token_ids: np.ndarray
    glyphs: np.ndarray


class Answers:
    """Answers as tokens: one for every character, so that each has its place on the page, but
    whole tokens for the keys of JSON. The token that ends the text comes last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.encode(END, add_special_tokens=False).ids

    def encode(self, answer: Marked) -> Encoded:
        encoded = self._tokenizer.encode(answer.text, add_special_tokens=False)
        glyphs = [
            answer.glyphs[start] if end - start == 1 else NOWHERE for start, end in encoded.offsets
        ]
        return Encoded(
            np.array([*encoded.ids, *self._end], np.int32), np.array([*glyphs, NOWHERE], np.int32)
        )
