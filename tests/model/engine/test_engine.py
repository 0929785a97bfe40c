"""The engine end to end, in one process, against generating one request at a time without it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.engine.memory import Capacity
from model.engine.rank import Rank
from model.layers.ragged import BLOCK_TOKENS
from schemas.errors import ConfigError, EngineError, Reason, RowError
from schemas.requests import FinishReason, Sampling
from tests.model.engine.conftest import (
    generate_slowly,
    text_request,
    tight_memory,
    token_ids,
)
from tests.model.engine.inside import rank_of


@pytest.fixture(scope="module")
def engine(checkpoint):
    with Engine(_config(checkpoint)) as engine:
        yield engine


def _config(checkpoint, **settings) -> EngineConfig:
    return EngineConfig(str(checkpoint), **{"device": "cpu", "max_sequences": 32, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"chunk_tokens": 128},
        {"chunk_tokens": 200, "max_sequences": 3},
        {"max_sequences": 1},
        {"chunk_tokens": 200, "max_sequences": 3, "ahead": True},
    ],
)
def test_a_rows_tokens_do_not_depend_on_its_batch_or_chunks(
    checkpoint, requests, expected, settings
):
    with Engine(_config(checkpoint, **settings)) as engine:
        assert token_ids(list(engine.generate(requests))) == expected
        assert engine.unfinished == 0
        statistics = engine.statistics
    assert statistics.prompt_tokens == sum(len(request.token_ids) for request in requests)
    assert statistics.output_tokens == sum(map(len, expected.values()))


@pytest.fixture
def small_gpu(monkeypatch):
    """One that is out of memory above 128 tokens, after layers have changed its states."""
    forward = Rank.forward

    def forward_few(self, hidden_TD, plan):
        hidden_TD = forward(self, hidden_TD, plan)
        if plan.tokens > 128:
            raise torch.OutOfMemoryError("injected")
        return hidden_TD

    monkeypatch.setattr(Rank, "forward", forward_few)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_engine_short_of_memory_goes_on_in_smaller_microbatches(
    checkpoint, requests, expected, small_gpu, caplog, ahead
):
    with Engine(_config(checkpoint, chunk_tokens=512, ahead=ahead)) as engine:
        assert token_ids(list(engine.generate(requests))) == expected
    assert "going on with chunk_tokens 128 instead of 256" in caplog.text


def test_an_engine_that_cannot_shrink_further_says_what_it_lacks(checkpoint, requests, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(Rank, "forward", forward)
    with (
        Engine(_config(checkpoint, chunk_tokens=600)) as engine,
        pytest.raises(EngineError, match="out of memory: injected"),
    ):
        list(engine.generate(requests))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_preempted_row_writes_the_same_tokens(
    checkpoint, decoder, requests, expected, model, ahead
):
    growing = [
        text_request(f"growing-{n}", 50 + n, max_new_tokens=90, temperature=1.0, seed=n)
        for n in range(5)
    ]
    settings = tight_memory(model, range(model.text.num_layers), slots=4, blocks=7)
    with Engine(_config(checkpoint, ahead=ahead, **settings)) as engine:
        assert engine.capacity == Capacity(4, 7)
        small = [request for request in requests if len(request.token_ids) < 150]
        results = token_ids(list(engine.generate(growing + small)))
        assert engine.statistics.preemptions > 0
    alone = {request.id: generate_slowly(decoder, request) for request in growing}
    assert results == alone | {request.id: expected[request.id] for request in small}


def test_an_engine_that_starts_over_keeps_nothing_of_preempted_rows(checkpoint, decoder, model):
    growing = [text_request(f"growing-{n}", 50 + n, max_new_tokens=90) for n in range(5)]
    settings = tight_memory(model, range(model.text.num_layers), slots=4, blocks=7)
    results = []
    with Engine(_config(checkpoint, **settings)) as engine:
        for request in growing:
            engine.add(request)
        while not rank_of(engine)._saved:
            results += engine.step()
        engine._start_over("injected")
        assert not rank_of(engine)._saved
        while engine.unfinished:
            results += engine.step()
    assert token_ids(results) == {each.id: generate_slowly(decoder, each) for each in growing}


def test_an_engine_that_starts_over_keeps_nothing_of_images(checkpoint, requests, expected):
    longest = max(requests, key=lambda request: len(request.token_ids))
    with Engine(_config(checkpoint, chunk_tokens=256)) as engine:
        engine.add(longest)
        engine.step()
        assert rank_of(engine)._features
        engine._start_over("injected")
        assert not rank_of(engine)._features
        assert token_ids(list(engine.generate([]))) == {longest.id: expected[longest.id]}


def test_requests_join_and_leave_while_others_are_generated(engine, requests, expected):
    results, waiting = [], list(requests)
    while waiting or engine.unfinished:
        if waiting:
            engine.add(waiting.pop())
        results += engine.step()
    assert token_ids(results) == expected
    assert engine.step() == []


def test_a_text_stops_before_its_stop_string(engine):
    free = text_request("free", 20, max_new_tokens=40, temperature=1.0, seed=4)
    (whole,) = engine.generate([free])
    assert len(whole.text) > 20
    stop = whole.text[10:14]
    sampling = replace(free.sampling, stop=(stop, "never written"))
    (stopped,) = engine.generate([replace(free, sampling=sampling)])
    assert stopped.finish_reason == FinishReason.STOP
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(whole.token_ids)


def test_a_text_ends_at_its_length_and_says_so(engine):
    (result,) = engine.generate([text_request("five", 20, max_new_tokens=5)])
    assert result.finish_reason == FinishReason.LENGTH
    assert len(result.token_ids) == 5
    assert result.prompt_tokens == 20
    assert result.mean_logprob < 0


def test_every_token_has_its_logprob_and_its_place_in_the_text(engine, requests):
    for result in engine.generate(requests):
        assert len(result.token_logprobs) == len(result.token_ends) == len(result.token_ids)
        assert max(result.token_logprobs) < 0
        assert sum(result.token_logprobs) == pytest.approx(
            result.mean_logprob * len(result.token_ids)
        )
        decode = engine._tokenizer.decode
        written = [id for id in result.token_ids if id not in engine._model.eos_token_ids]
        texts = [decode(written[: n + 1]) for n in range(len(result.token_ids))]
        assert result.token_ends == tuple(map(len, texts))
        assert result.token_ends[-1] == len(result.text)


def test_the_end_of_text_token_ends_a_text_and_is_not_in_it(checkpoint, engine, tmp_path):
    request = text_request("end", 20, max_new_tokens=40, temperature=1.0, seed=9)
    (whole,) = engine.generate([request])
    end = whole.token_ids[7]
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    with Engine(_config(tmp_path)) as other:
        (result,) = other.generate([request])
        assert result.finish_reason == FinishReason.STOP
        length = whole.token_ids.index(end) + 1
        assert result.token_ids == whole.token_ids[:length]
        assert result.text == other._tokenizer.decode(whole.token_ids[: length - 1])


def test_a_row_that_can_never_fit_is_refused_and_hurts_no_other(engine, requests, expected):
    longest = engine.capacity.blocks * BLOCK_TOKENS + 1
    with pytest.raises(RowError, match=f"{longest} prompt tokens") as refused:
        engine.add(text_request("long", longest, max_new_tokens=1))
    assert refused.value.reason == Reason.PROMPT_TOO_LONG
    (result,) = engine.generate(requests[:1])
    assert result.token_ids == expected[result.id]


def test_a_prompt_longer_than_the_configured_positions_is_not_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Engine(_config(tmp_path)) as engine:
        (result,) = engine.generate([text_request("page", 100, max_new_tokens=2)])
    assert result.prompt_tokens == 100


def test_image_tokens_that_do_not_match_the_image_are_refused_with_both_numbers(engine, requests):
    request = requests[0]
    tokens = int((request.token_ids == engine._model.image_token_id).sum())
    for damaged in (
        replace(request, tiles=None, image_size=None),
        replace(request, tiles=request.tiles[1:]),
        replace(request, token_ids=request.token_ids[:40]),
        replace(request, image_size=None),
        replace(request, token_ids=np.array([], dtype=np.int32)),
    ):
        with pytest.raises(ValueError, match=request.id):
            engine.add(damaged)
    with pytest.raises(ValueError, match=f"has {tokens} image tokens and 0 tiles"):
        engine.add(replace(request, tiles=None, image_size=None))
    assert engine.unfinished == 0


@pytest.mark.parametrize("id", [-1, 1024])
def test_ids_that_no_token_has_are_refused_and_stand_for_no_token_of_another_row(engine, id):
    request = text_request("odd", 5)
    request.token_ids[2] = id
    with pytest.raises(ValueError, match=rf"request odd has the token id {id}; expected 0 to 1023"):
        engine.add(request)
    assert engine.unfinished == 0


def test_generate_does_not_read_all_requests_into_memory(engine):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield text_request(str(taken), 5, max_new_tokens=2)

    results = engine.generate(endless())
    next(results)
    assert taken <= 2 * engine.capacity.slots
    results.close()
    while engine.unfinished:
        engine.step()


def test_tiles_are_sent_once_and_their_features_let_go(engine, requests):
    engine.add(requests[0])
    engine.step()
    assert all(live.tiles_to_send is None for live in engine._live.values())
    while engine.unfinished:
        engine.step()
    assert not rank_of(engine)._features


def test_a_failure_of_the_one_rank_is_an_engine_error(checkpoint, monkeypatch):
    monkeypatch.setattr(Rank, "forward", lambda *_: 1 / 0)
    with Engine(_config(checkpoint)) as engine:
        engine.add(text_request("any", 5))
        with pytest.raises(EngineError, match="rank 0 of 1 failed: ZeroDivisionError"):
            engine.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_tokens": 100}, "chunk_tokens is 100; expected 128 or more"),
        ({"ranks": 9}, "ranks is 9, the model has 8 layers"),
        ({"device": "tpu"}, "device is 'tpu'; expected one of auto, cpu, cuda"),
        ({"quantization": "int4"}, "quantization is 'int4'"),
        ({"cache_bytes": 1000}, "one of 4096 tokens takes"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"device": "cuda"}, "device is cuda, this machine has no GPU"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_generated(
    checkpoint, settings, message, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        Engine(_config(checkpoint, **settings))


def test_sampled_rows_of_different_seeds_differ(engine):
    request = text_request("seeds", 30, max_new_tokens=20, temperature=1.0)
    sampled = [
        replace(request, id=str(seed), sampling=replace(request.sampling, seed=seed))
        for seed in range(6)
    ]
    results = token_ids(list(engine.generate(sampled)))
    assert len(set(results.values())) == 6
    assert Sampling().seed == 0
    assert results["0"] == next(iter(engine.generate([request]))).token_ids
