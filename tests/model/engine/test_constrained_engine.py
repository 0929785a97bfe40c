"""Answers held to a schema, through the engine, beside others that are not: against generating one
at a time with a mask made from scratch for every token."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from model.engine.config import EngineConfig
from model.engine.constraint import Constraint, Constraints
from model.engine.engine import Engine
from model.engine.memory import Capacity
from model.tokenizer import Tokenizer
from schemas.errors import ConfigError
from schemas.extraction import load_schema
from schemas.requests import FinishReason, Request, Sampling
from tests.model.engine.conftest import generate_slowly, text_request, tight_memory, token_ids
from tests.schemas.random_schemas import random_schema

SCHEMAS = [
    {"type": "array", "items": {"type": "string"}},
    {
        "type": "object",
        "properties": {
            "currency": {"enum": ["EUR", "USD"]},
            "total": {"type": ["integer", "null"]},
            "lines": {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
        },
        "required": ["currency", "total", "lines"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
]


def _config(checkpoint, **settings) -> EngineConfig:
    return EngineConfig(str(checkpoint), **{"device": "cpu", "max_sequences": 32, **settings})


def _held(request: Request, schema: dict) -> Request:
    sampling = replace(request.sampling, json_schema=json.dumps(schema))
    return replace(request, id=f"held-{request.id}", sampling=sampling)


@pytest.fixture(scope="module")
def held(requests) -> list[Request]:
    """The same requests as the free ones, each with a schema."""
    return [_held(each, SCHEMAS[n % len(SCHEMAS)]) for n, each in enumerate(requests)]


@pytest.fixture(scope="module")
def may_follow(checkpoint, model) -> Callable[[str], Callable[[Sequence[int]], Sequence[bool]]]:
    """Schema -> written tokens -> may each token of the vocabulary follow? From the start again
    every time, in a mask of one row."""
    tokenizer = Tokenizer.from_checkpoint(checkpoint).serialize()
    constraints = Constraints(tokenizer, model.text.vocab_size, model.eos_token_ids, 1)

    def of_schema(schema: str):
        def may_follow(written: Sequence[int]) -> Sequence[bool]:
            constraint = constraints.start(schema)
            for token in written:
                constraints.advance([constraint], [token])
            bits = constraints.masks([constraint]).view(np.uint8)[0]
            unpacked = [bool(byte >> bit & 1) for byte in bits.tolist() for bit in range(8)]
            return unpacked[: model.text.vocab_size]

        return may_follow

    return of_schema


@pytest.fixture(scope="module")
def expected_held(decoder, held, may_follow) -> dict[str, tuple[int, ...]]:
    return {
        request.id: generate_slowly(decoder, request, may_follow(request.sampling.json_schema))
        for request in held
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ahead": True},
        {"chunk_tokens": 200, "max_sequences": 3, "ahead": True},
        {"ranks": 3, "chunk_tokens": 192, "threads": 1},
    ],
)
def test_held_and_free_rows_write_what_each_writes_alone(
    checkpoint, requests, expected, held, expected_held, settings
):
    mixed = [each for pair in zip(requests, held, strict=True) for each in pair]
    with Engine(_config(checkpoint, **settings)) as engine:
        results = list(engine.generate(mixed))
        assert engine.unfinished == 0
    assert token_ids(results) == expected | expected_held
    for result in results:
        assert result.finish_reason != FinishReason.CONSTRAINT
    # Most are cut short, but not all.
    complete = [r for r in results if r.id in expected_held and r.finish_reason == "stop"]
    assert len(complete) > 2
    for result in complete:
        json.loads(result.text)


@pytest.fixture(scope="module")
def growing(decoder, may_follow) -> tuple[list[Request], dict[str, tuple[int, ...]]]:
    """Requests that outgrow a small memory together, and what each writes alone."""
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 90}
    requests = [
        _held(text_request(f"{n}", 50 + n, max_new_tokens=80, temperature=1.0, seed=n), schema)
        for n in range(5)
    ]
    alone = may_follow(json.dumps(schema))
    return requests, {each.id: generate_slowly(decoder, each, alone) for each in requests}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_preempted_row_goes_on_where_its_grammar_stood(checkpoint, model, growing, ahead):
    requests, expected = growing
    settings = tight_memory(model, range(model.text.num_layers), slots=4, blocks=7)
    with Engine(_config(checkpoint, ahead=ahead, **settings)) as engine:
        assert engine.capacity == Capacity(4, 7)
        results = list(engine.generate(requests))
        assert engine.statistics.preemptions > 0
    assert token_ids(results) == expected


@pytest.fixture(scope="module")
def engine(checkpoint):
    with Engine(_config(checkpoint, ahead=True)) as engine:
        yield engine


def test_logprobs_are_the_models_own_also_where_the_schema_left_no_choice(engine):
    schema = {"type": "object", "properties": {"the": {"type": "null"}}, "required": ["the"]}
    schema["additionalProperties"] = False
    (result,) = engine.generate([_held(text_request("sure", 20, max_new_tokens=20), schema)])
    assert result.text == '{"the":null}'
    assert result.finish_reason == FinishReason.STOP
    assert len(result.token_logprobs) == len(result.token_ids)
    assert min(result.token_logprobs) < -2
    assert result.token_ends[-1] == len(result.text)


def test_the_end_of_text_comes_exactly_when_the_answer_is_complete(engine, model):
    schema = {"enum": ["a", "ab", "abc"]}
    rows = [
        _held(text_request(str(seed), 9, max_new_tokens=9, temperature=1.0, seed=seed), schema)
        for seed in range(12)
    ]
    results = list(engine.generate(rows))
    assert {result.text for result in results} <= {'"a"', '"ab"', '"abc"'}
    assert len({result.text for result in results}) > 1
    assert {result.token_ids[-1] for result in results} == set(model.eos_token_ids)


def test_a_stop_string_ends_a_held_answer_too(engine):
    request = _held(text_request("cut", 20, max_new_tokens=60), SCHEMAS[1])
    request = replace(request, sampling=replace(request.sampling, stop=('","total"',)))
    (result,) = engine.generate([request])
    assert result.finish_reason == FinishReason.STOP
    assert result.text in ('{"currency":"EUR', '{"currency":"USD')


def test_a_held_answer_without_room_is_cut_and_says_so(engine):
    (result,) = engine.generate([_held(text_request("tight", 20, max_new_tokens=3), SCHEMAS[1])])
    assert result.finish_reason == FinishReason.LENGTH
    assert len(result.token_ids) == 3


@pytest.mark.parametrize("settings", [{"ahead": True}, {"ranks": 2, "threads": 1}])
def test_a_grammar_that_breaks_down_ends_its_row_alone(
    checkpoint, model, held, expected_held, monkeypatch, settings
):
    victim = _held(text_request("victim", 12, max_new_tokens=30), SCHEMAS[0])
    with Engine(_config(checkpoint, **settings)) as engine:
        engine.add(victim)
        (live,) = engine._live.values()
        constraints, victims, written = engine._constraints, live.constraint, []
        assert constraints

        def break_down(several: Sequence[Constraint], tokens: Sequence[int]) -> list[bool]:
            tokens = list(tokens)
            if victims in several:
                at = several.index(victims)
                written.append(tokens[at])
                if len(written) == 3:
                    tokens[at] = model.image_token_id
            return Constraints.advance(constraints, several, tokens)

        monkeypatch.setattr(constraints, "advance", break_down)
        results = {result.id: result for result in engine.generate(held[:4])}
    broken = results.pop(victim.id)
    assert broken.finish_reason == FinishReason.CONSTRAINT
    assert broken.token_ids == tuple(written)
    assert token_ids(list(results.values())) == {
        request.id: expected_held[request.id] for request in held[:4]
    }


def test_a_schema_that_cannot_be_followed_is_refused_and_hurts_no_other(engine, requests, expected):
    bad = replace(requests[0], sampling=Sampling(json_schema='{"type": "bogus"}'))
    with pytest.raises(ConfigError, match="Invalid type: bogus"):
        engine.add(bad)
    assert engine.unfinished == 0
    assert token_ids(list(engine.generate(requests[:2]))) == {
        request.id: expected[request.id] for request in requests[:2]
    }


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="few"), pytest.param(1000, id="many", marks=pytest.mark.slow)]
)
def test_every_finished_answer_parses_follows_its_schema_and_is_compact(checkpoint, count):
    """Random schemas, bounded as `extract` bounds them; random weights, temperature 1."""
    schemas = [random_schema(random.Random(seed)) for seed in range(count)]
    extractions = [load_schema(json.dumps(schema)) for schema in schemas]
    rows = []
    for n, extraction in enumerate(extractions):
        row = text_request(str(n), 6 + n % 50, max_new_tokens=150, temperature=1.0, seed=n)
        rows.append(_held(row, json.loads(extraction.json_schema)))
    with Engine(_config(checkpoint, max_sequences=128, ahead=True)) as engine:
        results = {result.id: result for result in engine.generate(rows)}
    assert len(results) == count
    finished = 0
    for row, schema, extraction in zip(rows, schemas, extractions, strict=True):
        result = results[row.id]
        if result.finish_reason == FinishReason.LENGTH:
            assert len(result.token_ids) == 150
            continue
        assert result.finish_reason == FinishReason.STOP
        _check_answer(result.text, schema)
        extraction.parse(result.text)
        finished += 1
    print(f"{finished} of {count} were finished")
    assert finished > count // 4


def _check_answer(text: str, schema: dict) -> None:
    # Decimals throughout: of floats, 2306.47 is no multiple of 0.01.
    schema, answer = (json.loads(each, parse_float=Decimal) for each in (json.dumps(schema), text))
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(schema, format_checker=checker).validate(answer)
    outside = re.sub(r'"([^"\\]|\\.)*"', "", text)
    assert not re.search(r"\s", outside), text
