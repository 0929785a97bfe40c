"""That the checkpoint in this repository reads, also when the engine goes another way about it, and
that what it says would tell of faults. `vl01 bench quality --compare all` measures more pages."""

from dataclasses import replace
from pathlib import Path

import pytest

import model.nano
from jobs.bench.quality import json_schemas
from model.engine.config import EngineConfig
from model.nano.answer_loss import answer_loss
from model.nano.faults import FAULTS
from model.nano.quality import FONTS, ask, held_out_pages, score

CHECKPOINT = Path(model.nano.__path__[0]) / "checkpoint"

# Beyond what was measured of these very pages on a CPU, which stands behind each.
MOST_CHARACTERS_WRONG = 0.01  # 0.0
LEAST_FIELDS_RIGHT = 0.95  # 1.0, free and held
MOST_NATS = 0.01  # 0.0031
MOST_NATS_OF_INT8 = 0.002  # 0.0003, int8-dynamic
LEAST_NATS_OF_A_FAULT = 0.1  # 0.19, the slope of one layer


@pytest.fixture(scope="module")
def config():
    return EngineConfig(str(CHECKPOINT), device="cpu", quantization="none")


@pytest.fixture(scope="module")
def pages():
    """A receipt and a text of 2 tiles beside the thumbnail, a table of 4."""
    return held_out_pages(4, FONTS["training fonts"])[1:]


@pytest.fixture(scope="module")
def small(pages):
    return pages[:2]


@pytest.fixture(scope="module")
def loss(config, small):
    return answer_loss(config, small, tasks=["read"])


def test_it_reads(config, pages):
    read = score(ask(config, pages, json_schemas=json_schemas()))
    assert read.character_errors <= MOST_CHARACTERS_WRONG
    assert min(read.fields, read.held_fields) >= LEAST_FIELDS_RIGHT


def test_the_truth_does_not_surprise_it(loss):
    assert loss.tokens > 200
    assert loss.nats < MOST_NATS


def test_ranks_and_chunks_change_nothing(config, small, loss):
    otherwise = replace(config, ranks=4, chunk_tokens=128)
    assert answer_loss(otherwise, small, tasks=["read"]) == loss


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic"])
def test_int8_costs_next_to_nothing(config, small, loss, quantization):
    quantized = replace(config, quantization=quantization)
    nats = answer_loss(quantized, small, tasks=["read"]).nats
    assert abs(nats - loss.nats) < MOST_NATS_OF_INT8


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows(config, small, loss, name):
    nats = answer_loss(config, small, FAULTS[name], tasks=["read"]).nats
    assert nats > loss.nats + LEAST_NATS_OF_A_FAULT
