"""The simulated ranks tell what was measured of one, and several of them have work all the time."""

import json
from dataclasses import replace

import pytest

from jobs import cli
from jobs.bench.simulation import STREAMS, Asked, Delays, mean_tokens, simulate, stream
from jobs.bench.slice import released_model
from model.config import VL01Config, load_config
from model.engine.config import EngineConfig, usual_chunk_tokens
from model.engine.memory import Capacity
from model.engine.ranks import layer_spans
from model.nano.random_checkpoint import RELEASED_SIZES, write_configuration
from pipeline.estimate.gpus import capacity_estimate
from pipeline.estimate.measured import TABLE

GIB = 1024**3


@pytest.fixture(scope="module")
def released() -> VL01Config:
    return released_model()


@pytest.mark.parametrize("measured", TABLE[0].workloads, ids=lambda work: work.name)
def test_the_cost_model_tells_what_was_measured(tmp_path, measured):
    """8 layers on one rank, by the seconds of the README's table."""
    write_configuration(tmp_path, replace(RELEASED_SIZES, layers=TABLE[0].layers))
    requests = [Asked(measured.prompt, measured.new, tiles=0)] * measured.requests
    told = simulate(
        load_config(tmp_path), 1, Capacity(256, 60_000), requests, delays=Delays(0, 0, 0, 0)
    )
    assert told.seconds == pytest.approx(measured.seconds, rel=0.025)


@pytest.mark.parametrize("vary", [0.0, 0.7])
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(("ranks", "gib"), [(2, 270), (4, 139), (8, 79)])
def test_no_rank_waits_long_for_another_whatever_the_answers(released, name, ranks, gib, vary):
    """Answers of one length end in bunches; of many, at all times. Either used to starve ranks."""
    engine = EngineConfig("", ranks=ranks, device="cuda")
    capacity = capacity_estimate(released, engine, gib * GIB)
    told = simulate(released, ranks, capacity, stream(name, vary=vary))
    assert min(told.steady) > 0.9
    assert max(told.steady) <= 1
    assert min(told.busy) > 0.8  # with the first prompts and the last answers


@pytest.mark.parametrize("name", STREAMS)
def test_several_ranks_get_microbatches_that_leave_memory_for_more_sequences(released, name):
    engine = EngineConfig("", ranks=4, device="cuda", tokens_per_sequence=mean_tokens(name))
    usual = usual_chunk_tokens(on_gpu=True, ranks=4)

    def rate(chunk_tokens: int) -> float:
        capacity = capacity_estimate(
            released, replace(engine, chunk_tokens=chunk_tokens), 139 * GIB
        )
        requests = stream(name, at_least=4 * capacity.slots)
        return simulate(released, 4, capacity, requests, chunk_tokens=chunk_tokens).rate

    assert rate(usual) > 0.995 * rate(2 * usual)


def test_a_simulation_adds_up(released):
    """One request, one token: every rank once, one after the other."""
    told = simulate(released, 4, Capacity(1, 100), [Asked(64, 1, 0)])
    assert told.microbatches == 1
    assert len(told.busy) == len(layer_spans(released, 4)) == 4
    assert sum(told.busy) < 1
    assert sum(told.busy) * told.seconds == pytest.approx(told.seconds, abs=0.005)


def test_the_rate_of_a_long_run_leaves_out_how_it_begins_and_ends(released):
    engine = EngineConfig("", ranks=4, device="cuda")
    capacity = capacity_estimate(released, engine, 139 * GIB)
    short, long = (
        simulate(released, 4, capacity, stream("coco640x480", at_least=fills * capacity.slots))
        for fills in (5, 10)
    )
    assert short.rate == pytest.approx(long.rate, rel=0.03)
    assert short.requests / short.seconds < 0.96 * short.rate


def test_the_command_shows_the_split_and_calls_the_rest_simulated(capsys, tmp_path):
    numbers = tmp_path / "numbers.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "ranks", "--pp", "4", "--json", str(numbers)])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "40 to 59" in shown
    assert "simulated" in shown
    told = json.loads(numbers.read_text())
    assert [rank["last_layer"] for rank in told["ranks"]] == [19, 39, 59, 79]
    assert told["simulated"].keys() == STREAMS.keys()


def test_gpus_that_are_too_small_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "ranks", "--pp", "2"])
    assert ended.value.code == 2
    assert "--pp 4 would do" in capsys.readouterr().err
