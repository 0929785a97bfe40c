"""What may come next under a schema, against every answer written out; what is refused, and how."""

import json
import re
from itertools import product

import numpy as np
import pytest

from model.engine.constraint import Constraint, Constraints, check_schema
from model.tokenizer import Tokenizer
from schemas.errors import CheckpointError, ConfigError

# With few answers, so that all can be written out.
FIELDS = {"the": ["white", "whi", 'a "b"'], "ok": [True, False], "n": [7, 71], "of": [None]}
FINITE = json.dumps(
    {
        "type": "object",
        "properties": {name: {"enum": values} for name, values in FIELDS.items()},
        "required": list(FIELDS),
        "additionalProperties": False,
    }
)
ANSWERS = [
    json.dumps(dict(zip(FIELDS, values, strict=True)), separators=(",", ":"))
    for values in product(*FIELDS.values())
]


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def constraints(tokenizer, model) -> Constraints:
    return Constraints(tokenizer.serialize(), model.text.vocab_size, model.eos_token_ids, 2)


def allowed(constraints: Constraints, *several: Constraint) -> list[set[int]]:
    """The tokens that each mask allows, read bit by bit."""
    masks = constraints.masks(several)
    assert masks.dtype == np.int32
    return [
        {token for token in range(32 * len(row)) if int(row[token // 32]) >> token % 32 & 1}
        for row in masks
    ]


def test_exactly_the_tokens_that_can_lead_to_an_answer_are_allowed(constraints, tokenizer, model):
    (end,) = model.eos_token_ids
    texts = {id: tokenizer.decode([id]) for id in range(model.text.vocab_size)}
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        constraint, text = constraints.start(FINITE), ""
        while True:
            possible = {
                id
                for id, piece in texts.items()
                if piece and any(answer.startswith(text + piece) for answer in ANSWERS)
            }
            (now,) = allowed(constraints, constraint)
            expected = possible | ({end} if text in ANSWERS else set())
            next_ones = {a[len(text) :][:1] for a in ANSWERS if a.startswith(text)}
            if (
                len(next_ones) == 1 and "" not in next_ones
            ):  # text without a choice: cut as the tokenizer cuts it
                assert now, text
                assert now <= expected, text
            else:
                assert now == expected, text
            if not possible:
                break
            token = int(rng.choice(sorted(now)))
            constraints.advance([constraint], [token])
            text += texts[token]
        assert constraint.error is None
        seen.add(text)
    assert len(seen) > 5
    assert seen <= set(ANSWERS)


def test_special_tokens_and_ids_that_no_token_has_are_never_allowed(constraints, tokenizer, model):
    schema = json.dumps({"type": "array", "items": {"type": "string"}})
    constraint, (end,) = constraints.start(schema), model.eos_token_ids
    known = {id for id in range(model.text.vocab_size) if tokenizer.decode([id])}
    assert len(known) < model.text.vocab_size - 3, "the test wants columns without a token"
    for piece in ('["', "any <image> text", '"]'):
        for token in tokenizer._encode(piece):
            if token in known:
                constraints.advance([constraint], [token])
            (now,) = allowed(constraints, constraint)
            assert now <= known | {end}
            assert (end in now) == (constraint.matcher.is_accepting())
    assert now == {end}
    assert constraint.error is None


def test_a_mask_does_not_depend_on_those_computed_beside_it(constraints, tokenizer):
    starts = ["{", '{"the":"whi', '{"the":"white","ok":t', "", '{"the":"whi","ok":false,"n":7']
    several = []
    for text in starts:
        several.append(constraints.start(FINITE))
        for token in tokenizer._encode(text):
            constraints.advance(several[-1:], [token])
    alone = [allowed(constraints, constraint)[0] for constraint in several]
    assert allowed(constraints, *several) == alone
    assert len(set(map(frozenset, alone))) == len(alone)
    assert constraints.masks([]).shape[0] == 0


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
        {"type": "object", "x-guidance": {"whitespace_flexible": True, "item_separator": " , "}},
    ],
)
def test_no_whitespace_is_allowed_outside_of_strings(constraints, tokenizer, schema):
    rng, texts = np.random.default_rng(0), []
    for _ in range(30):
        constraint, written = constraints.start(json.dumps(schema)), []
        for _ in range(40):
            (now,) = allowed(constraints, constraint)
            spaces = [id for id in now if tokenizer.decode([id])[:1].isspace()]
            token = int(rng.choice(spaces if spaces and rng.random() < 0.3 else sorted(now)))
            constraints.advance([constraint], [token])
            written.append(token)
        texts.append(tokenizer.decode(written))
    outside = [re.sub(r'"([^"\\]|\\.)*("|$)', "", text) for text in texts]
    assert not any(re.search(r"\s", text) for text in outside)
    assert any(" " in text for text in texts), "no text had a chance"


def test_a_constraint_that_cannot_go_on_says_why_and_lets_the_text_end(constraints, model):
    broken, sound, other = (constraints.start(FINITE) for _ in range(3))
    (start,) = allowed(constraints, sound)
    refused = min(set(range(100)) - start)
    assert constraints.advance([broken, other], [refused, min(start)]) == [False, True]
    assert "doesn't satisfy the grammar" in (broken.error or "")
    assert sound.error is None
    assert allowed(constraints, broken, sound) == [set(model.eos_token_ids), start]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "is not JSON: "),
        ("[1]", r"is \[1\]; expected an object"),
        ('{"type": "bogus"}', "Invalid type: bogus"),
        ('{"properties": {"a": {"not": {}}}}', 'Unimplemented keys: \\["not"\\]'),
        ('{"type": "string", "format": "colour"}', "Unknown format: colour"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
        ('{"$ref": "#/$defs/line"}', "does not exist"),
    ],
)
def test_a_schema_that_answers_cannot_be_held_to_is_refused_with_the_reason(
    constraints, schema, message
):
    for refuse in (check_schema, constraints.start):
        with pytest.raises(ConfigError, match=message):
            refuse(schema)
    check_schema(FINITE)


def test_a_tokenizer_that_cannot_be_used_is_named_as_the_cause(tokenizer, model):
    size, ends = model.text.vocab_size, model.eos_token_ids
    for wrong in (("{}", size, ends), (tokenizer.serialize(), 300, ends)):
        with pytest.raises(CheckpointError, match="by the checkpoint's tokenizer"):
            Constraints(*wrong, 1)
    with pytest.raises(CheckpointError, match="with an end of text"):
        Constraints(tokenizer.serialize(), size, (), 1)
