"""How sure each field is, from the tokens of an answer on, against a look at each token's bytes."""

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from model.engine.answer import Answer
from pipeline.generate import extracted_columns
from schemas.extraction import load_schema
from schemas.requests import FinishReason, Result, Sampling
from tests.schemas.random_schemas import random_schema, random_value

END = 0
Leaves = dict[tuple, tuple[int, int]]  # path of a value -> its bytes, from first to one after last


def _write(value: Any, path: tuple, at: int, leaves: Leaves) -> bytes:
    """Compact JSON that begins at byte `at`. Of a string, the quote before it is not its own."""
    if isinstance(value, dict):
        text = b"{"
        for name, field in value.items():
            text += (b"," if len(text) > 1 else b"") + json.dumps(name, ensure_ascii=False).encode()
            text += b":"
            text += _write(field, (*path, name), at + len(text), leaves)
        return text + b"}"
    if isinstance(value, list):
        text = b"["
        for n, item in enumerate(value):
            text += b"," if n else b""
            text += _write(item, (*path, n), at + len(text), leaves)
        return text + b"]"
    text = json.dumps(value, ensure_ascii=False, default=float).encode()
    leaves[path] = at + isinstance(value, str), at + len(text)
    return text


def _cut(text: bytes, rng: random.Random) -> list[bytes]:
    """Into tokens, also within a character."""
    mean = rng.choice([1, 2, 5, 20])
    cuts = [at for at in range(1, len(text)) if rng.random() < 1 / mean]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _result(tokens: list[bytes], logprobs: list[float]) -> Result:
    """As the engine makes it, token by token."""
    pieces = [b"", *tokens]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(pieces[id] for id in ids).decode(errors="replace")

    answer = Answer(Sampling(max_new_tokens=len(pieces) + 1), (END,), decode)
    for id, logprob in zip([*range(1, len(pieces)), END], logprobs, strict=True):
        answer.append(id, logprob)
    assert answer.finish_reason == FinishReason.STOP
    return Result(
        id="",
        text=answer.text,
        token_ids=tuple(answer.token_ids),
        finish_reason=answer.finish_reason,
        prompt_tokens=1,
        mean_logprob=answer.mean_logprob,
        token_logprobs=tuple(logprobs),
        token_ends=tuple(answer.token_ends),
    )


def _found(confidence: Any, of: pa.DataType, path: tuple) -> tuple[Any, pa.DataType]:
    for step in path:
        confidence = confidence[step]
        of = of.value_type if isinstance(of, pa.ListType) else of.field(step).type
    return confidence, of


@pytest.mark.parametrize("seed", range(60))
def test_a_field_is_as_sure_as_the_least_likely_token_that_has_a_byte_of_it(seed):
    rng = random.Random(seed)
    schema = random_schema(rng)
    extraction = load_schema(json.dumps(schema))
    for _ in range(3):
        leaves: Leaves = {}
        text = _write(random_value(schema, rng), (), 0, leaves)
        tokens = _cut(text, rng)
        logprobs = [-rng.expovariate(1) for _ in (*tokens, END)]
        columns = extracted_columns(extraction, _result(tokens, logprobs))
        begins = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
        for path, (first, last) in leaves.items():
            sure, type_ = _found(columns["confidence"], extraction.confidence_type, path)
            if not pa.types.is_floating(type_):  # a null in place of a list or an object
                assert sure is None
                continue
            least = min(
                logprob
                for begin, token, logprob in zip(begins, tokens, logprobs, strict=False)
                if begin < last and begin + len(token) > first
            )
            assert sure == pytest.approx(math.exp(least)), path
