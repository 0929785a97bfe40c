"""The generate stage around an engine that is faked: answers are computed from the request."""

import threading
from collections import deque
from dataclasses import replace
from typing import ClassVar, cast

import numpy as np
import pyarrow as pa
import pytest

from model.engine.config import EngineConfig
from model.engine.engine import EngineStatistics, Occupancy
from pipeline import replica
from pipeline.attempts import Climb
from pipeline.canary import Canary
from pipeline.finish import finish
from pipeline.generate import Generate, GenerateSettings, row_seed
from schemas.errors import ConfigError, EngineError, Reason, RowError
from schemas.extraction import load_schema
from schemas.ladder import Cause, Step
from schemas.requests import FinishReason, Request, Result, Sampling
from schemas.rows import GENERATED, PREPARED

TILE = 4
NOTHING_KEPT = pa.schema([])


class FakeEngine:
    """Finishes one request a step, the latest first, so that answers come out of order."""

    statistics = EngineStatistics()
    rank_busy_seconds = ()
    occupancy = Occupancy(running=0, slots=0.0, blocks=0.0)

    def __init__(self, config: EngineConfig, *_: object) -> None:
        self.queue: deque[Request] = deque()
        self.most = 0

    @property
    def unfinished(self) -> int:
        return len(self.queue)

    def add(self, request: Request) -> None:
        if request.token_ids.size > 5:
            raise RowError(Reason.PROMPT_TOO_LONG, "6 tokens; expected at most 5")
        self.queue.append(request)
        self.most = max(self.most, len(self.queue))

    def step(self) -> list[Result]:
        request = self.queue.pop()
        assert request.tiles is not None
        text = f"{request.tiles.sum()} {request.sampling.seed} {request.image_size}"
        length = request.tiles.shape[0] == 2
        return [
            Result(
                id=request.id,
                text=text,
                token_ids=(1, 2, 3),
                finish_reason=FinishReason.LENGTH if length else FinishReason.STOP,
                prompt_tokens=request.token_ids.size,
                mean_logprob=-0.5,
                token_logprobs=(-0.5, -0.5, -0.5),
                token_ends=(1, 2, len(text)),
            )
        ]


@pytest.fixture
def stage(monkeypatch) -> Generate:
    monkeypatch.setattr(replica, "Engine", FakeEngine)
    settings = GenerateSettings(EngineConfig("nowhere"), Sampling(seed=7), TILE, NOTHING_KEPT)
    return Generate(settings)


def prepared(rows: list[dict]) -> pa.Table:
    defaults = {"unit": 0, "index": 0, "source": "a", "read_seconds": 0.0, "prepare_seconds": 0.0}
    return pa.Table.from_pylist([defaults | row for row in rows], schema=PREPARED)


def good_row(row_id: str, tiles: int = 1, tokens: int = 3) -> dict:
    pixels = np.full(tiles * TILE * TILE * 3, len(row_id), np.uint8)
    return {
        "row_id": row_id,
        "tiles": tiles,
        "width": 10,
        "height": 20,
        "token_ids": list(range(tokens)),
        "pixels": pixels,
    }


def test_each_row_gets_its_own_answer_in_the_order_of_the_rows(stage):
    table = stage(prepared([good_row("a"), good_row("bb"), good_row("ccc")]))
    assert table.schema.equals(GENERATED)
    assert table["row_id"].to_pylist() == ["a", "bb", "ccc"]
    for row_id, text in zip(table["row_id"].to_pylist(), table["text"].to_pylist(), strict=True):
        assert text == f"{len(row_id) * 48} {row_seed(7, row_id)} (10, 20)"


def test_a_row_that_failed_before_is_passed_on_and_not_computed(stage):
    bad = {"row_id": "x", "reason": Reason.DECODE_ERROR, "message": "cut"}
    table = stage(prepared([bad, good_row("a")]))
    assert table["reason"].to_pylist() == ["decode_error", None]
    assert table["attempts"].to_pylist() == [0, 1]
    assert table["text"][0].as_py() is None


def test_a_prompt_that_can_never_fit_costs_one_row(stage):
    table = stage(prepared([good_row("long", tokens=6), good_row("a")]))
    assert table["reason"].to_pylist() == ["prompt_too_long", None]
    assert "expected at most 5" in table["message"][0].as_py()


def test_an_answer_cut_at_its_limit_says_so(stage):
    table = stage(prepared([good_row("a", tiles=2)]))
    assert table["finish_reason"].to_pylist() == ["length"]
    assert table["reason"].to_pylist() == ["max_new_tokens"]


def test_calls_side_by_side_share_one_engine_and_the_same_row_sent_twice_is_answered_twice(stage):
    rows = [good_row("a" * (1 + i)) for i in range(30)]
    tables: list[pa.Table] = []
    threads = [
        threading.Thread(target=lambda: tables.append(stage(prepared(rows)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(tables) == 4
    assert all(table["text"].to_pylist() == tables[0]["text"].to_pylist() for table in tables)


def start_with(monkeypatch, engine) -> Generate:
    monkeypatch.setattr(replica, "Engine", engine)
    monkeypatch.setattr(replica, "START_WAIT_SECONDS", 0.0)
    return Generate(GenerateSettings(EngineConfig("nowhere"), Sampling(), TILE, NOTHING_KEPT))


def test_an_engine_that_cannot_start_says_why_and_fails_the_batch_not_the_actor(monkeypatch):
    def broken(config: EngineConfig, *_: object) -> None:
        raise ConfigError("47 GB of weights, 20 GB of memory")

    stage = start_with(monkeypatch, broken)
    with pytest.raises(ConfigError, match="47 GB"):
        stage(prepared([good_row("a")]))


def test_a_replica_that_fails_between_its_start_and_its_first_row_does_not_wait_for_ever(
    monkeypatch,
):
    def broken(engine: FakeEngine) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(replica, "ReplicaMetrics", broken)
    stage = start_with(monkeypatch, lambda config, *_: FakeEngine(config))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        stage(prepared([good_row("a")]))


def test_gpus_that_are_freed_late_do_not_end_the_run(monkeypatch):
    failures = [MemoryError("still held"), MemoryError("still held")]

    def late(config: EngineConfig, *_: object) -> FakeEngine:
        if failures:
            raise failures.pop()
        return FakeEngine(config)

    assert start_with(monkeypatch, late)(prepared([good_row("a")]))["attempts"].to_pylist() == [1]


def test_an_engine_that_breaks_while_it_is_checked_is_closed_and_started_again(monkeypatch):
    closed, failures = [], [EngineError("rank 1 of 2 was killed by SIGKILL")]

    class Closing(FakeEngine):
        def close(self) -> None:
            closed.append(self)

    class Check:
        def check(self, engine: FakeEngine) -> None:
            if failures:
                raise failures.pop()

    monkeypatch.setattr(replica, "Engine", lambda config, *_: Closing(config))
    monkeypatch.setattr(replica, "START_WAIT_SECONDS", 0.0)
    config, check, told = EngineConfig("nowhere"), cast(Canary, Check()), []
    assert replica.start_engine(config, canary=check, at=told.append) not in closed
    assert len(closed) == 1
    assert told == ["the model is loaded, answering two images to check it"] * 2


def test_the_seed_of_a_row_depends_on_the_row_and_the_job_alone():
    assert row_seed(0, "a") == row_seed(0, "a")
    assert len({row_seed(0, "a"), row_seed(0, "b"), row_seed(1, "a")}) == 3


SCHEMA = '{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}'


class JsonEngine(FakeEngine):
    """Writes a token for each character, of the log-probability of -1 each."""

    answers: ClassVar[dict[str, str]] = {"good": '{"n":7}', "odd": '{"n":"7"}', "cut": '{"n":'}

    def step(self) -> list[Result]:
        request = self.queue.pop()
        text = self.answers[request.id]
        return [
            Result(
                id=request.id,
                text=text,
                token_ids=tuple(range(len(text))),
                finish_reason=FinishReason.LENGTH if request.id == "cut" else FinishReason.STOP,
                prompt_tokens=3,
                mean_logprob=-1.0,
                token_logprobs=(-1.0,) * len(text),
                token_ends=tuple(range(1, len(text) + 1)),
            )
        ]


def test_an_answer_becomes_typed_fields_or_a_reason_and_a_cut_one_stays_cut(monkeypatch):
    monkeypatch.setattr(replica, "Engine", JsonEngine)
    config, asked = EngineConfig("nowhere"), load_schema(SCHEMA)
    stage = Generate(GenerateSettings(config, Sampling(), TILE, NOTHING_KEPT, asked))
    table = stage(prepared([good_row("odd"), good_row("good"), good_row("cut")]))
    assert table.schema.field("data").type == asked.arrow_type
    assert table["data"].to_pylist() == [None, {"n": 7}, None]
    assert table["confidence"].to_pylist() == [None, {"n": pytest.approx(0.3679, abs=1e-4)}, None]
    assert table["reason"].to_pylist() == ["schema_mismatch", None, "max_new_tokens"]
    assert table["text"].to_pylist() == ['{"n":"7"}', '{"n":7}', '{"n":']


class Tired(FakeEngine):
    """Goes in circles at temperature 0; every fourth row keeps on doing so."""

    asked: list[Request]

    def __init__(self, config: EngineConfig, *_: object) -> None:
        super().__init__(config)
        self.asked = Tired.asked = []

    def add(self, request: Request) -> None:
        super().add(request)
        self.asked.append(request)

    def step(self) -> list[Result]:
        (result,) = super().step()
        request = next(r for r in self.asked if r.id == result.id)
        hopeless = request.image_size is not None and request.image_size[0] % 4 == 0
        if request.sampling.temperature == 0 or hopeless:
            result = replace(result, finish_reason=FinishReason.REPETITION, text="circles")
        return [result]


LADDER = (
    Step(when=(Cause.REPETITION,), temperature=0.4),
    Step(when=(Cause.REPETITION,), temperature=0.8),
)


def stage_with(monkeypatch, engine=Tired, **settings) -> Generate:
    monkeypatch.setattr(replica, "Engine", engine)
    climb = Climb(LADDER, settings.pop("retries", None))
    return Generate(
        GenerateSettings(
            EngineConfig("nowhere"), Sampling(seed=7), TILE, NOTHING_KEPT, climb=climb, **settings
        )
    )


def rows_of(table: pa.Table) -> dict[str, dict]:
    """By row_id, without what depends on who was first and how long it took."""
    left_out = ("generate_seconds", "replica_seconds", "rank_seconds", "copied")
    return {row["row_id"]: row for row in table.drop_columns(list(left_out)).to_pylist()}


def test_poor_answers_are_tried_again_and_the_others_are_not(monkeypatch):
    rows = [good_row("a" * n) | {"width": n} for n in range(1, 9)]
    table = stage_with(monkeypatch)(prepared(rows))
    assert table["attempts"].to_pylist() == [2, 2, 2, 3, 2, 2, 2, 3]
    assert table["reason"].to_pylist() == [None, None, None, "repetition"] * 2
    assert table["row_id"].to_pylist() == [row["row_id"] for row in rows]
    assert len(Tired.asked) == 8 + 8 + 2
    table = stage_with(monkeypatch, retries=0)(prepared(rows))
    assert table["attempts"].to_pylist() == [1] * 8


def test_the_same_seed_gives_the_same_rows_whatever_batch_they_fall_into(monkeypatch):
    rows = [
        good_row("a" * n) | {"width": n, "image_sha256": f"image {n % 5}"} for n in range(1, 13)
    ]
    for row in rows:
        like = rows[(len(row["row_id"]) - 1) % 5]  # identical images are identical in all
        row |= {name: like[name] for name in ("width", "pixels")}
    whole = rows_of(stage_with(monkeypatch, dedupe=True)(prepared(rows)))
    stage = stage_with(monkeypatch, dedupe=True)
    alone = {}
    for row in reversed(rows):
        alone |= rows_of(stage(prepared([row])))
    assert alone == whole
    assert len({row["text"] for row in whole.values()}) > 3
    apart = {}
    for row in rows:  # each in a replica of its own: nothing to copy from
        apart |= rows_of(stage_with(monkeypatch, dedupe=True)(prepared([row])))
    assert apart == whole


@pytest.mark.parametrize("dedupe", [True, False])
def test_identical_images_are_computed_once_also_by_calls_side_by_side(monkeypatch, dedupe):
    rows = [good_row(f"{n:03}") | {"image_sha256": f"image {n % 3}"} for n in range(60)]
    stage = stage_with(monkeypatch, dedupe=dedupe)
    tables: list[pa.Table] = []
    threads = [
        threading.Thread(target=lambda i=i: tables.append(stage(prepared(rows[i::4]))))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    table = pa.concat_tables(tables)
    assert table.num_rows == 60
    assert len(Tired.asked) == (3 if dedupe else 60) * 2
    assert sum(table["copied"].to_pylist()) == (57 if dedupe else 0)
    assert set(table["attempts"].to_pylist()) == {2}
    texts = {(row["image_sha256"], row["text"]) for row in table.to_pylist()}
    assert len(texts) == (3 if dedupe else 60)


def test_a_failed_answer_is_not_copied_to_a_later_row(monkeypatch):
    stage = stage_with(monkeypatch, dedupe=True)
    first = stage(prepared([good_row("a", tokens=6) | {"image_sha256": "x"}]))
    assert first["reason"].to_pylist() == ["prompt_too_long"]
    later = stage(prepared([good_row("b") | {"image_sha256": "x"}]))
    assert later["reason"].to_pylist() == [None]
    assert later["copied"].to_pylist() == [False]


def test_a_bug_in_one_batch_does_not_leave_another_waiting(monkeypatch):
    stage = stage_with(monkeypatch, dedupe=True)
    monkeypatch.setattr(stage, "_judge", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage(prepared([good_row("a") | {"image_sha256": "x"}, good_row("b")]))
    monkeypatch.undo()
    again = stage(prepared([good_row("a") | {"image_sha256": "x"}]))
    assert again["attempts"].to_pylist() == [2]


def test_a_blank_page_is_answered_without_the_model(monkeypatch):
    blank = {"row_id": "x", "reason": Reason.BLANK, "width": 5, "height": 5}
    table = stage_with(monkeypatch)(prepared([blank, good_row("a")]))
    assert table["text"].to_pylist()[0] == ""
    assert table["attempts"].to_pylist() == [0, 2]
    assert len(Tired.asked) == 2
    done = finish(table)
    assert done["status"].to_pylist() == ["ok", "ok"]
    assert done["reason"].to_pylist() == ["blank", None]


def test_a_note_on_the_image_stays_with_its_answer(monkeypatch):
    row = good_row("a") | {"message": "transparency laid on white"}
    table = stage_with(monkeypatch)(prepared([row]))
    assert table["message"].to_pylist() == ["transparency laid on white"]
