"""The loss of the truth, against what the engine says of its own answers; and the faults."""

import pytest
import torch

from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.inputs.images import prepare_image
from model.nano.answer_loss import Reader, answer_loss
from model.nano.faults import FAULTS
from model.nano.quality import FONTS, ask, held_out_pages, png
from model.nano.random_checkpoint import write_random_checkpoint
from model.nano.tasks import prompts
from model.tokenizer import Tokenizer
from schemas.errors import ConfigError
from schemas.requests import Request, Sampling


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = write_random_checkpoint(
        tmp_path_factory.mktemp("random"), hidden_size=64, heads=4, kv_heads=2, head_dim=16,
        experts=2, intermediate_size=32, vision_layers=1, vision_hidden_size=32,
        vision_intermediate_size=32, pinpoints=[(336, 672), (672, 336)],
    )  # fmt: skip
    return EngineConfig(str(folder), device="cpu", quantization="none")


@pytest.fixture(scope="module")
def page():
    return held_out_pages(2, FONTS["held-out font"])[1]


def test_a_token_costs_what_the_engine_gave_it_when_it_wrote_it(config, page):
    reader = Reader(config)
    cut = prepare_image(png(page), reader.model.pinpoints)
    template = Tokenizer.from_checkpoint(config.checkpoint).prompt_template(prompts()["read"])
    question, size = template.fill(cut.layout.tokens), (cut.width, cut.height)
    with Engine(config) as engine:
        request = Request("0", question, cut.tiles, size, Sampling(max_new_tokens=70))
        [written] = engine.generate([request])
    assert len(written.token_ids) > 5
    features = reader.see(torch.from_numpy(cut.tiles), size)
    nats, wrong = reader.losses(question, features, torch.tensor(written.token_ids).numpy())
    torch.testing.assert_close(-nats, torch.tensor(written.token_logprobs), rtol=1e-4, atol=1e-4)
    assert not wrong.any()


def test_neither_ranks_nor_chunks_change_the_loss(config, page):
    whole = answer_loss(config, [page], tasks=["describe"])
    assert whole.tokens > 20
    assert whole.nats > 3  # about what the logarithm of 1,024 tokens is, or more
    for other in ({"ranks": 4}, {"chunk_tokens": 200}):
        changed = EngineConfig(**{**vars(config), **other})
        assert answer_loss(changed, [page], tasks=["describe"]) == whole


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_goes_in_whichever_rank_holds_it(config, page, name):
    whole = answer_loss(config, [page], tasks=["describe"])
    in_one = answer_loss(config, [page], FAULTS[name], ["describe"])
    assert abs(in_one.nats - whole.nats) > 1e-4
    several = EngineConfig(**{**vars(config), "ranks": 3})
    assert answer_loss(several, [page], FAULTS[name], ["describe"]) == in_one


def test_a_fault_reaches_what_the_engine_writes(config, page):
    told, confused = (
        ask(config, [page], 12, fault) for fault in (None, FAULTS["rotary on all dimensions"])
    )
    assert [each.truth for each in told] == [each.truth for each in confused]
    assert [each.answer for each in told] != [each.answer for each in confused]


def test_a_fault_to_ranks_in_other_processes_is_refused(config, page):
    several = EngineConfig(**{**vars(config), "ranks": 2})
    with pytest.raises(ConfigError, match="1 rank, not 2"):
        ask(several, [page], fault=FAULTS["tiles in wrong order"])
