"""The run of mixed lengths, small and on a CPU: it passes where all is well, and sees what is not.

Whether there is a GPU makes no difference to what is seen, so these run anywhere.
"""

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.engine.engine import Engine
from model.engine.scheduler import Scheduler
from model.engine.sequence import blocks_for
from schemas.requests import FinishReason, Request, Result, Sampling
from tests.gpu import bench_mixed, mixed_load
from tests.gpu.mixed_load import Sample, Trend, Window
from tests.gpu.mixed_requests import KINDS, Books, Lengths, _fault

SMALL = "--width tiny --layers 1 --experts 4 --device cpu --chunk-tokens 512 --max-sequences 8"
SMALL += " --tokens-per-sequence 1 --prompt 1 600 --new 1 120 --window 0.25 --most-slower 0.9"


def run(seconds: float, numbers: Path, more: str = "") -> tuple[int, dict]:
    line = f"{SMALL} --seconds {seconds} --json {numbers} {more}".split()
    code = bench_mixed.main(line)
    return code, json.loads(numbers.read_text())


def test_a_sound_engine_passes(tmp_path, monkeypatch):
    asked: list[Request] = []
    add = Engine.add

    def noted(self, request):
        asked.append(request)
        add(self, request)

    def fits(self, sequence):
        """Without spare blocks: some sequences will have to make room for others."""
        needed = blocks_for(sequence.tokens)
        return self._memory.free_slots > 0 and self._memory.free_blocks >= needed

    monkeypatch.setattr(Engine, "add", noted)
    monkeypatch.setattr(Scheduler, "_fits", fits)
    code, numbers = run(5, tmp_path / "numbers.json", "--prompt 100 600 --new 20 120")
    assert numbers["wrong"] == []
    assert code == 0
    assert numbers["requests"] == len(asked) - 2 * len(bench_mixed.PROBES)
    assert numbers["samples"][-1]["running"] == numbers["samples"][-1]["waiting"] == 0
    assert numbers["samples"][-1]["preemptions"] > 0
    assert sum(request.tiles is not None for request in asked) > 0
    assert {sampling.top_p for _, sampling in KINDS.values()} == {r.sampling.top_p for r in asked}
    assert len({r.sampling.json_schema for r in asked}) == 2


def test_requests_that_are_lost_or_answered_twice_or_cut_short_are_seen(tmp_path, monkeypatch):
    step = Engine.step
    counted = 0

    def careless(self):
        nonlocal counted
        kept = []
        for result in step(self):
            counted += 1
            if counted == 20:
                continue
            if counted == 30:
                result = replace(result, token_ids=(*result.token_ids, 0))
            kept += [result, result] if counted == 40 else [result]
        return kept

    monkeypatch.setattr(Engine, "step", careless)
    code, numbers = run(3, tmp_path / "numbers.json")
    told = "\n".join(numbers["wrong"])
    assert code == 1
    assert told.count("was never answered") == 1
    assert told.count("was answered a second time") == 1
    assert told.count("probabilities of them") == 1


def test_memory_that_does_not_come_back_and_other_tokens_are_seen(tmp_path, monkeypatch):
    """A block whose id is lost, and weights that something has written over."""
    release, step = Scheduler._release, Engine.step
    released = 0

    def forgetful(self, sequence):
        nonlocal released
        released += 1
        if released == 30:
            sequence.blocks.pop()
        release(self, sequence)

    def overwriting(self):
        if released >= 30 and self.decoder.norm.weight[0] > 0:
            self.decoder.norm.weight.neg_()
        return step(self)

    monkeypatch.setattr(Scheduler, "_release", forgetful)
    monkeypatch.setattr(Engine, "step", overwriting)
    code, numbers = run(3, tmp_path / "numbers.json")
    told = "\n".join(numbers["wrong"])
    assert code == 1
    assert "1 blocks were never given back" in told
    assert "got other tokens at the end than at the beginning" in told


def test_an_engine_that_grows_and_slows_down_is_seen(tmp_path, monkeypatch):
    step, kept, began = Engine.step, [], time.monotonic()

    def worse(self):
        kept.append(np.ones(1 << 18))  # 2 MiB
        time.sleep(0.04 if 4 < time.monotonic() - began < 6 else 0)
        return step(self)

    monkeypatch.setattr(Engine, "step", worse)
    monkeypatch.setattr(mixed_load, "MOST_RSS", 20 << 20)
    code, numbers = run(5, tmp_path / "numbers.json", "--most-slower 0.3")
    told = "\n".join(numbers["wrong"])
    assert code == 1
    assert "slower than the first" in told
    assert "the host's memory grew by" in told


def test_an_engine_that_stops_is_seen(tmp_path, monkeypatch):
    """It must not be waited for without end, nor be taken for one that has answered all."""
    step, stuck = Engine.step, []

    def stopping(self):
        results = step(self)
        stuck.extend(results)
        return [] if len(stuck) > 20 else results

    monkeypatch.setattr(Engine, "step", stopping)
    monkeypatch.setattr(mixed_load, "PATIENCE", 0.5)
    code, numbers = run(3, tmp_path / "numbers.json")
    assert code == 1
    assert sum("was never answered" in sentence for sentence in numbers["wrong"]) > 5


def windows(speeds: list[float], **growing: int) -> list[Window]:
    """Of 20 s each; growing: bytes that a window adds."""
    start = Sample(*[0] * len(Sample.__dataclass_fields__))
    samples = [start]
    for speed in speeds:
        last = samples[-1]
        more = {name: getattr(last, name) + by for name, by in growing.items()}
        foreseen = last.foreseen + 20 * speed
        samples.append(replace(last, seconds=last.seconds + 20, foreseen=foreseen, **more))
    return [Window(since, until) for since, until in itertools.pairwise(samples)]


def test_a_trend_is_of_the_second_half():
    steady = Trend.of(windows([1.0, 1.1, 0.9, 1.0, 1.0, 1.0]))
    assert steady.slower == pytest.approx(0)
    assert steady.wrong(0.05) == []
    slower = Trend.of(windows([1.0, 1.0, 1.0, 0.96, 0.94, 0.92]))
    assert slower.slower == pytest.approx(0.06)
    assert len(slower.wrong(0.05)) == 1
    assert slower.wrong(0.07) == []
    grown = Trend.of(windows([1.0] * 12, reserved=100 << 20, rss=50 << 20))
    assert (grown.reserved, grown.rss) == pytest.approx((600 << 20, 300 << 20))
    assert len(grown.wrong(0.05)) == 2
    still = replace(grown, reserved=0, rss=float(1 << 20))
    assert still.wrong(0.05) == []


def answer(**changes) -> Result:
    two = Result("a", "xy", (5, 6), FinishReason.LENGTH, 3, -0.5, (-1.0, 0.0), (1, 2))
    return replace(two, **changes)


def test_an_answer_must_be_as_it_was_asked_for():
    request = Request("a", np.zeros(3, np.int32), sampling=Sampling(max_new_tokens=2))
    stopped = replace(request, sampling=Sampling(max_new_tokens=3, stop=("e",)))
    held = replace(request, sampling=Sampling(max_new_tokens=2, json_schema="{}"))
    assert not _fault(request, answer())
    assert not _fault(stopped, answer(finish_reason=FinishReason.STOP))
    assert not _fault(held, answer(text="["))
    assert _fault(request, answer(finish_reason=FinishReason.STOP))
    assert _fault(stopped, answer())
    assert _fault(request, answer(prompt_tokens=2))
    assert _fault(request, answer(token_logprobs=(float("nan"), 0.0)))
    assert _fault(held, answer())
    books = Books()
    books.answer(answer())
    assert books.wrong == ["request a was answered though it never asked"]


def test_lengths_are_spread_evenly_over_their_orders_of_magnitude():
    rng = np.random.default_rng(0)
    drawn = np.array([Lengths(1, 2000).draw(rng, 10**9) for _ in range(4000)])
    assert (drawn.min(), drawn.max()) == (1, pytest.approx(2000, rel=0.02))
    assert np.mean(drawn < 45) == pytest.approx(0.5, abs=0.05)
    assert max(Lengths(1, 2000).draw(rng, 30) for _ in range(500)) == 30
    assert Lengths(50, 11000).draw(rng, 10) == 50
