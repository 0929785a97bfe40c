"""A schema that cannot be kept is refused by path; an answer that breaks one is a row, no crash."""

import json
import pickle
import random
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pyarrow as pa
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from schemas.errors import ConfigError, Reason, RowError
from schemas.extraction import Extraction, load_schema
from tests.schemas.random_schemas import Schema, random_schema, random_value

INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "description": "as printed"},
        "date": {"type": ["string", "null"], "format": "date"},
        "total": {"type": "number", "multipleOf": 0.01},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
    },
    "required": ["number", "date", "total", "lines"],
    "$defs": {
        "line": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["text"],
        }
    },
}


def field(schema: Schema) -> Extraction:
    """An extraction of one field, `x`."""
    return load_schema(json.dumps({"type": "object", "properties": {"x": schema}}))


def refusal(schema: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_schema(schema if isinstance(schema, str) else json.dumps(schema))
    return str(caught.value)


def rejected(extraction: Extraction, text: str) -> tuple[Reason, str]:
    with pytest.raises(RowError) as caught:
        extraction.parse(text)
    caught.value.message.encode()
    assert len(caught.value.message) < 300
    return caught.value.reason, caught.value.message


@pytest.mark.parametrize(
    ("schema", "type_"),
    [
        ({"type": "string"}, pa.string()),
        ({"type": "string", "format": "date"}, pa.date32()),
        ({"type": "string", "format": "date-time"}, pa.timestamp("us", "UTC")),
        ({"type": "integer"}, pa.int64()),
        ({"type": "number"}, pa.float64()),
        ({"type": "number", "multipleOf": 0.01}, pa.decimal128(17, 2)),
        ({"type": ["boolean", "null"]}, pa.bool_()),
        ({"enum": ["a", "b", None]}, pa.string()),
        ({"const": 5}, pa.int64()),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, pa.int64()),
        ({"type": "array", "items": {"type": "string"}}, pa.list_(pa.string())),
    ],
)
def test_each_kind_has_its_arrow_type(schema, type_):
    assert field(schema).arrow_type == pa.struct([("x", type_)])


def test_an_invoice_is_one_typed_struct():
    invoice = load_schema(json.dumps(INVOICE))
    line = pa.struct([("text", pa.string()), ("count", pa.int64())])
    assert invoice.arrow_type == pa.struct(
        [
            ("number", pa.string()),
            ("date", pa.date32()),
            ("total", pa.decimal128(17, 2)),
            ("lines", pa.list_(line)),
        ]
    )
    text = '{"number":"7","date":null,"total":1.5,"lines":[{"text":"a"},{"text":"b","count":2}]}'
    assert invoice.parse(text) == {
        "number": "7",
        "date": None,
        "total": Decimal("1.50"),
        "lines": [{"text": "a", "count": None}, {"text": "b", "count": 2}],
    }
    assert pickle.loads(pickle.dumps(invoice)) == invoice


def test_the_prompt_names_every_field_with_its_description():
    assert load_schema(json.dumps(INVOICE)).description.splitlines() == [
        "- number (text): as printed",
        "- date (date as YYYY-MM-DD, or null)",
        "- total (number with at most 2 decimals)",
        "- lines (list of object)",
        "  - text (text)",
        "  - count (integer, if there is one)",
    ]


@pytest.mark.parametrize("seed", range(150))
def test_a_value_that_follows_its_schema_comes_back_whole_from_arrow(seed):
    rng = random.Random(seed)
    schema = random_schema(rng)
    extraction = load_schema(json.dumps(schema))
    values = [random_value(schema, rng) for _ in range(5)]
    texts = [dump(value) for value in values]
    rows = [extraction.parse(text) for text in texts]
    column = pa.array(rows, extraction.arrow_type)
    assert column.to_pylist() == rows
    assert [without_nulls(row) for row in rows] == [without_nulls(read(text)) for text in texts]


@pytest.mark.parametrize("seed", range(150))
def test_the_verdict_on_a_changed_value_is_that_of_jsonschema(seed):
    rng = random.Random(seed)
    schema = random_schema(rng)
    extraction = load_schema(json.dumps(schema))
    oracle = jsonschema.Draft202012Validator(
        json.loads(json.dumps(schema), parse_float=Decimal),
        format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
    )
    for _ in range(20):
        text = dump(changed(random_value(schema, rng), rng))
        expected = oracle.is_valid(json.loads(text, parse_float=Decimal))
        assert takes(extraction, text) == expected, text


@pytest.mark.parametrize("seed", range(30))
def test_nothing_that_the_engine_may_write_can_go_on_for_ever(seed):
    text = load_schema(json.dumps(random_schema(random.Random(seed)))).json_schema
    for schema in described(json.loads(text)):
        keys = schema.keys()
        if schema.get("type") == "string":
            assert "maxLength" in keys or schema["pattern"].startswith("^([1-9]")  # a date
        elif schema.get("type") == "array":
            assert "maxItems" in keys
        elif schema.get("type") == "object":
            assert schema["additionalProperties"] is False
        elif schema.get("type") in ("integer", "number"):
            assert "multipleOf" in keys or schema["type"] == "integer"
            assert keys & {"minimum", "exclusiveMinimum"}
            assert keys & {"maximum", "exclusiveMaximum"}


def described(schema: Schema) -> Iterator[Schema]:
    """The schema and all that are within it."""
    yield schema
    within = [*schema.get("properties", {}).values(), *schema.get("anyOf", [])]
    for below in [*within, *([schema["items"]] if "items" in schema else [])]:
        yield from described(below)


def takes(extraction: Extraction, text: str) -> bool:
    try:
        extraction.parse(text)
    except RowError:
        return False
    return True


def dump(value: Any) -> str:
    """JSON with Decimals as numbers, their digits as they are."""
    numbers: dict[str, str] = {}

    def mark(number: Decimal) -> str:
        numbers[f'"~{len(numbers)}~"'] = str(number)
        return f"~{len(numbers) - 1}~"

    text = json.dumps(value, default=mark, ensure_ascii=False)
    for marked, number in numbers.items():
        text = text.replace(marked, number)
    return text


def read(text: str) -> Any:
    """As Arrow would have it: dates and numbers with decimals in their classes."""
    return json.loads(text, parse_float=Decimal, object_hook=_dated)


def _dated(found: dict[str, Any]) -> dict[str, Any]:
    return {name: _as_date(value) for name, value in found.items()}


def _as_date(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_date(item) for item in value]
    if isinstance(value, str) and len(value) == 10 and value[4] == value[7] == "-":
        return date.fromisoformat(value)
    return value


def without_nulls(value: Any) -> Any:
    """A field that was left out is null; floats are compared by what they print."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return float(value) if isinstance(value, int | Decimal) else value


def changed(value: Any, rng: random.Random) -> Any:
    """Often the value itself; else something in it is another, is gone, or is one more."""
    odd = [None, True, 0, -5, Decimal("0.005"), "", "2024-02-31", "x" * 30, [], {}, 10**6]
    if rng.random() < 0.2:
        return rng.choice(odd)
    if isinstance(value, list):
        more = [rng.choice(odd)] if rng.random() < 0.1 else []
        return [changed(item, rng) for item in value] + more
    if isinstance(value, dict):
        left = {k: changed(v, rng) for k, v in value.items() if rng.random() < 0.95}
        return left | ({"unknown": 1} if rng.random() < 0.05 else {})
    return value


# Answers that only look right


@pytest.mark.parametrize(
    "text",
    [
        *("", "no", "{", '{"x":1', '{"x":1}}', '```json\n{"x":1}\n```', "\ufeff{}", '{"x":1,}'),
        *('{"x":NaN}', '{"x":Infinity}', '{"x":-Infinity}', '{"x":1,"x":2}', "{'x':1}"),
        *('{"x":01}', '{"x":"a\nb"}', "[" * 100_000, '{"x":1e999999999999999999999}', "\ud800"),
        '{"\ud800":1,"\ud800":1}',
    ],
)
def test_what_is_not_json_is_told_so(text):
    reason, message = rejected(field({"type": ["number", "null"]}), text)
    assert reason == Reason.INVALID_JSON
    assert message.startswith("not JSON: ")


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ("integer", "9223372036854775808", "x is 9223372036854775808; expected an integer of 64"),
        ("integer", "9" * 5000, "expected an integer of 64 bits"),
        ("integer", "1e999999999", "expected an integer of 64 bits"),
        ("integer", "1.5", "x is 1.5; expected integer"),
        ("integer", "true", "x is true; expected integer"),
        ("integer", '"1"', 'x is "1"; expected integer'),
        ("number", "1e400", "expected a finite number"),
        ("number", "null", "x is null; expected number"),
        (
            {"type": "number", "multipleOf": 0.01},
            "1.005",
            "expected number with at most 2 decimals",
        ),
        ({"type": "number", "multipleOf": 0.01}, "1e15", "at most 15 digits before the point"),
        ({"type": "number", "multipleOf": 0.01}, "1e999999999", "at most 15 digits"),
        (
            {"type": "number", "multipleOf": 0.01},
            "1e-999999999",
            "expected number with at most 2 dec",
        ),
        ({"type": "string", "format": "date"}, '"2024-02-31"', "expected a date of the calendar"),
        ({"type": "string", "format": "date"}, '"20240131"', "expected date as YYYY-MM-DD"),
        ({"type": "string", "format": "date"}, '"2024-01-3\u0663"', "expected date as YYYY-MM-DD"),
        ({"type": "string", "format": "date-time"}, '"2024-01-31T25:00:00Z"', "that exist"),
        ({"type": "string", "format": "date-time"}, '"9999-12-31T23:59:59-01:00"', "that exist"),
        ({"type": "string", "format": "date-time"}, '"2024-01-31T12:00:00"', "YYYY-MM-DDThh:mm"),
        ("string", '"\\ud800"', "half of a surrogate pair"),
        ({"type": "string", "maxLength": 2}, '"abc"', "expected text of at most 2 characters"),
        ({"type": "string", "pattern": "^a"}, '"b"', "expected text matching ^a"),
        ({"type": "string", "pattern": "^(a|b$)$"}, '"a\\n"', "expected text matching ^(a|b$)$"),
        ({"enum": [1, 2]}, "true", "x is true; expected one of 1, 2"),
        ({"enum": ["a"]}, '"\\ud800"', "expected one of"),
        ({"const": True}, "1", "x is 1; expected one of true"),
        ({"type": "array", "items": {"type": "integer"}}, "[1,null]", "x[1] is null; expected int"),
        (
            {"type": "array", "items": {"type": "integer"}, "maxItems": 1},
            "[1,2]",
            "x has 2 items; expected 0 to 1",
        ),
    ],
)
def test_a_value_that_arrow_could_not_hold_or_the_schema_forbids_is_a_mismatch(
    schema, value, expected
):
    told = {"type": schema} if isinstance(schema, str) else schema
    reason, message = rejected(field(told), f'{{"x":{value}}}')
    assert reason == Reason.SCHEMA_MISMATCH
    assert expected in message


def test_a_dollar_that_is_a_character_of_a_pattern_is_taken_for_one():
    price = field({"type": "string", "pattern": r"^([$€]|\$\\)[^\]$]$"})
    assert price.parse('{"x":"$5"}') == {"x": "$5"}
    assert price.parse(r'{"x":"$\\5"}') == {"x": "$\\5"}
    assert "matching" in rejected(price, '{"x":"$$"}')[1]


def test_fields_that_are_missing_or_unknown_are_named():
    invoice = load_schema(json.dumps(INVOICE))
    text = '{"number":"7","date":null,"total":1,"lines":[{"count":1}]}'
    assert rejected(invoice, text)[1] == "lines[0] lacks 'text'"
    assert rejected(invoice, '{"number":"7"}')[1] == "the answer lacks 'date'"
    assert rejected(field({"const": 1}), '{"y":1}')[1] == (
        "the answer has 'y', which is not in the schema"
    )
    assert rejected(invoice, "[]")[1] == "the answer is []; expected an object"


def test_a_moment_is_kept_in_utc():
    moment = field({"type": "string", "format": "date-time"})
    found = moment.parse('{"x":"2024-03-01T00:30:00.5+01:00"}')["x"]
    assert found == datetime(2024, 2, 29, 23, 30, 0, 500_000, UTC)


# Confidence


def test_a_value_is_as_sure_as_the_least_likely_of_its_own_tokens():
    extraction = load_schema(json.dumps(INVOICE))
    tokens = [
        ('{"', -9.0), ("number", -9.0), ('":"', -9.0), ("A", -0.5), ("7", -1.0), ('","', -0.25),
        ('date":', -9.0), ("null", -2.0), (',"total":', -9.0), ("1", -3.0), ("2.5", -0.5),
        (',"lines":[', -9.0), ('{"text":"', -9.0), ('b"', -4.0), ("}", -9.0), ("]}", -9.0),
    ]  # fmt: skip
    text = "".join(token for token, _ in tokens)
    ends = [len("".join(token for token, _ in tokens[: i + 1])) for i in range(len(tokens))]
    found = extraction.confidence(text, [logprob for _, logprob in tokens], ends)
    column = pa.array([found], extraction.confidence_type).to_pylist()[0]
    expected = {"number": 0.3679, "date": 0.1353, "total": 0.0498}
    assert {name: column[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert column["lines"][0]["text"] == pytest.approx(0.0183, abs=1e-3)
    assert column["lines"][0]["count"] is None


def test_each_value_is_found_in_a_text_with_spaces_and_escapes():
    extraction = load_schema(json.dumps(INVOICE))
    text = ' { "number" : "a\\"}" ,\n"total": 1e1 , "date":"2024-02-29","lines" : [ ] } '
    ends = list(range(1, len(text) + 1))
    wanted = {"number": text.index("a\\"), "date": text.index("2024"), "total": text.index("1e1")}
    for name, place in wanted.items():
        logprobs = [-1.0 if i == place else 0.0 for i in range(len(text))]
        found = extraction.confidence(text, logprobs, ends)
        assert {n for n in wanted if found[n] < 1} == {name}
    assert extraction.confidence(text, logprobs, ends)["lines"] == []


# Schemas that are refused


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"oneOf": [{"type": "string"}]}, "#/properties/x/oneOf: a value is given by one type"),
        ({"type": ["string", "integer"]}, "#/properties/x/type: a value is given by one type"),
        ({"type": "null"}, "#/properties/x/type: "),
        ({}, "#/properties/x/type: "),
        (True, "#/properties/x: a value is given by"),
        ({"properties": {"a": {}}}, "#/properties/x/type: "),
        ({"type": "string", "maxlength": 3}, "#/properties/x/maxlength: not usable; the keywords"),
        ({"type": "string", "format": "email"}, "#/properties/x/format: only date and date-time"),
        ({"type": "string", "format": "date", "pattern": "a"}, "x/pattern: not beside format date"),
        ({"type": "string", "pattern": "("}, "#/properties/x/pattern: not valid in a JSON Schema"),
        ({"type": "string", "pattern": "^(?=a)"}, "x: no answer can be held to it: regex parse"),
        ({"type": "string", "pattern": "^[[:alpha:]]+$"}, "x/pattern: [ within [...] is not"),
        ({"type": "string", "pattern": r"^[\[a-z--b]+$"}, "x/pattern: -- within [...] is not"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "x: no answer can be held to it: "),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "x: no answer can be held to it: "),
        ({"type": "integer", "minimum": 10**30}, "x: no answer can be held to it: "),
        ({"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 2}, "x/minItems: "),
        ({"type": "number", "multipleOf": 0.05}, "#/properties/x/multipleOf: only 0.1, 0.01"),
        ({"type": "integer", "multipleOf": 5}, "#/properties/x/multipleOf: not usable"),
        ({"enum": [1, "a"]}, "#/properties/x/enum: expected strings, integers or booleans"),
        ({"enum": [1.5]}, "#/properties/x/enum: "),
        ({"enum": [None]}, "#/properties/x/enum: "),
        ({"enum": [1, 2**63]}, "x/enum: 9223372036854775808 is no integer of 64 bits"),
        ({"enum": ["a"], "type": "integer"}, "#/properties/x/type: the values of enum are of type"),
        ({"type": "array"}, "#/properties/x/items: expected the schema of the items"),
        ({"type": "array", "items": {"not": {}}}, "#/properties/x/items/not: "),
        (
            {"type": "array", "items": {"const": 1}, "uniqueItems": True},
            "x/uniqueItems: not usable",
        ),
        ({"type": "object"}, "#/properties/x/properties: expected the object's fields"),
        ({"type": "object", "properties": {"a/b": {}}}, "#/properties/x/properties/a~1b/type: "),
        ({"type": "object", "properties": {"": {"const": 1}}}, "without a name"),
        (
            {"type": "object", "properties": {"a": {"const": 1}, "A": {"const": 1}}},
            "#/properties/x/properties/A: differs from 'a' in case only",
        ),
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": True},
            "#/properties/x/additionalProperties: only false",
        ),
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "required": ["b"]},
            "#/properties/x/required: 'b' is not among the properties",
        ),
        ({"$ref": "https://example.org/s"}, "x/$ref: 'https://example.org/s' is not in #/$defs"),
        ({"$ref": "#/$defs/none"}, "#/properties/x/$ref: '#/$defs/none' is not in #/$defs"),
        ({"anyOf": [{"const": 1}, {"const": 2}]}, "#/properties/x/anyOf: expected a value and"),
        ({"type": "strin"}, "x/type: not valid in a JSON Schema: 'strin'; expected one of string"),
        ({"type": "string", "maxLength": -1}, "#/properties/x/maxLength: not valid in a JSON"),
    ],
)
def test_a_keyword_that_cannot_be_used_is_refused_by_its_path(schema, expected):
    assert expected in refusal({"type": "object", "properties": {"x": schema}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ('{"type":"object","type":"object"}', "'type' is given twice"),
        ("[]", "no JSON object"),
        ('{"type":"array","items":{"const":1}}', "#/type: the schema must be of an object"),
        ('{"type":"object","properties":{"\\ud800":{"const":1}}}', "surrogate"),
        ('{"type":"object","properties":{"x":{"const":"\\ud800"}}}', "surrogate"),
        ('{"not":' * 5000 + "{}" + "}" * 5000, "nested too deeply"),
    ],
)
def test_a_text_that_is_no_schema_is_refused(text, expected):
    assert expected in refusal(text)


def test_all_problems_are_told_at_once():
    fields = {"a": {"type": "array"}, "b": {"not": {}}, "c": {"type": "string"}}
    lines = refusal({"type": "object", "properties": fields}).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "#/properties/a/items",
        "#/properties/b/not",
    ]


def test_a_schema_that_holds_itself_has_no_columns():
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    schema = {
        "$defs": {"node": node},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/node"}},
    }
    assert refusal(schema).startswith("#/$defs/node/properties/next/$ref: '#/$defs/node' holds it")


def test_references_that_multiply_do_not_fill_the_memory():
    defs: Schema = {"d0": {"type": "string"}}
    for i in range(1, 40):
        half = {"$ref": f"#/$defs/d{i - 1}"}
        defs[f"d{i}"] = {"type": "object", "properties": {"a": half, "b": half}}
    schema = {"$defs": defs, "type": "object", "properties": {"x": {"$ref": "#/$defs/d39"}}}
    assert "more than 1,000 values" in refusal(schema)


# What is written under the constraint


@pytest.mark.parametrize("seed", range(100))
def test_whatever_the_engine_may_write_is_taken_and_valid(seed):
    """A walk through the grammar, where each byte that may come next is as likely as any other."""
    schema = random_schema(random.Random(seed))
    extraction = load_schema(json.dumps(schema))
    for walk in range(3):
        text = walked(extraction.json_schema, np.random.default_rng([seed, walk]))
        extraction.parse(text)
        found = json.loads(text, parse_float=Decimal)
        jsonschema.validate(found, json.loads(json.dumps(schema), parse_float=Decimal))


@pytest.mark.parametrize("seed", range(60))
def test_whatever_follows_the_schema_may_be_written(seed):
    """Or the model would have to write something else, and nobody would know."""
    rng = random.Random(seed)
    schema = random_schema(rng)
    extraction = load_schema(json.dumps(schema))
    for _ in range(5):
        text = json.dumps(
            json.loads(dump(random_value(schema, rng))), ensure_ascii=False, separators=(",", ":")
        )
        extraction.parse(text)
        _, matcher = held_to(extraction.json_schema)
        accepted = matcher.try_consume_tokens(list(text.encode()))
        assert (accepted, matcher.is_accepting()) == (len(text.encode()), True), text


def held_to(json_schema: str) -> tuple[llguidance.LLTokenizer, llguidance.LLMatcher]:
    """Byte by byte."""
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        json_schema,
        overrides={"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
    )
    return tokenizer, llguidance.LLMatcher(tokenizer, grammar)


def walked(json_schema: str, rng: np.random.Generator) -> str:
    tokenizer, matcher = held_to(json_schema)
    mask = allocate_token_bitmask(1, tokenizer.vocab_size)
    written = b""
    while True:
        fill_next_token_bitmask(matcher, mask)
        assert not matcher.is_error(), matcher.get_error()
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        byte = int(rng.choice(np.flatnonzero(bits)))
        if byte == tokenizer.eos_token:
            return written.decode()
        written += bytes([byte])
        matcher.consume_token(byte)
