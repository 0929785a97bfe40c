"""Ranks that run out of memory, in processes of their own: the text of an untroubled engine, and no
rank left waiting for another."""

import json
import re

import pytest

from model.engine.config import EngineConfig
from model.engine.engine import Engine
from schemas.errors import OutOfMemoryError
from tests.model.engine.conftest import text_request, token_ids

pytestmark = pytest.mark.slow

EVERY = ALWAYS = None
PROMPT = 65  # tokens; the requests are too few to decode as many in a microbatch
ANY = 0


def _config(checkpoint, ranks: int, **settings) -> EngineConfig:
    settings = {"max_sequences": 32, "threads": 1, **settings}
    return EngineConfig(str(checkpoint), device="cpu", ranks=ranks, **settings)


def test_ranks_short_of_memory_start_over_together_wherever_and_whenever_one_is(
    checkpoint, requests, expected, trouble, caplog
):
    trouble(
        ("memory", 0, 0, "take_image", ANY, 5),
        ("memory", 1, 1, "forward", PROMPT, 1),
        ("memory", 2, 2, "sample", ANY, 10),
        ("memory", 3, 1, "receive", PROMPT, 1),
        ("memory", 4, 0, "embed", ANY, 12),
        ("memory", 5, 2, "receive", ANY, 9),
        ("memory", 6, 1, "forward", ANY, 30),
    )
    with Engine(_config(checkpoint, 3, chunk_tokens=16384)) as engine:
        pids = engine.rank_pids
        assert token_ids(list(engine.generate(requests))) == expected
        assert engine.rank_pids == pids
    said = r"rank (\d) .* is out of memory: injected in (\w+); going on with chunk_tokens (\d+)"
    found = re.findall(said, caplog.text)
    assert found == [
        ("0", "take_image", "8192"),
        ("1", "forward", "4096"),
        ("2", "sample", "2048"),
        ("1", "receive", "1024"),
        ("0", "embed", "512"),
        ("2", "receive", "256"),
        ("1", "forward", "128"),
    ]


def test_masks_for_what_is_not_computed_any_more_are_for_nothing_else(checkpoint, trouble, caplog):
    schema = json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 9})
    held = [
        text_request(str(n), 60 + n, max_new_tokens=30, json_schema=schema, temperature=1.0, seed=n)
        for n in range(5)
    ]
    with Engine(_config(checkpoint, 1)) as engine:
        expected = token_ids(list(engine.generate(held)))
    trouble(
        ("memory", 0, 1, "forward", ANY, 1),
        ("memory", 1, 1, "sample", ANY, 4),
        ("memory", 2, 0, "forward", ANY, 7),
    )
    with Engine(_config(checkpoint, 2, chunk_tokens=1024)) as engine:
        assert token_ids(list(engine.generate(held))) == expected
    assert re.findall(r"chunk_tokens (\d+) instead", caplog.text) == ["512", "256", "128"]


def test_ranks_that_run_out_of_memory_at_the_same_time_start_over_once(
    checkpoint, requests, expected, trouble, caplog
):
    trouble(*(("memory", ALWAYS, rank, "forward", 200, EVERY) for rank in range(3)))
    with Engine(_config(checkpoint, 3, chunk_tokens=512)) as engine:
        assert token_ids(list(engine.generate(requests))) == expected
    assert re.findall(r"chunk_tokens (\d+) instead", caplog.text) == ["256", "128"]


def test_ranks_that_cannot_shrink_further_say_what_they_lack_and_end(checkpoint, trouble):
    trouble(("memory", ALWAYS, 1, "forward", ANY, EVERY))
    with Engine(_config(checkpoint, 2, chunk_tokens=300)) as engine:
        engine.add(text_request("any", 5))
        with pytest.raises(
            OutOfMemoryError,
            match=r"rank 1 of 2 \(pid \d+\) is out of memory: injected in forward; microbatches of "
            "150 tokens cannot be halved again: use more ranks",
        ):
            list(engine.generate([]))
