"""A replica that computes wrong is found, and one that only rounds otherwise is left in peace."""

import hashlib
import time
from dataclasses import replace

import pytest

from model.config import load_config
from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.nano.random_checkpoint import write_random_checkpoint
from model.tokenizer import Tokenizer
from pipeline import canary
from pipeline.canary import Canary, CanaryAnswer, CanarySettings, WrongAnswerError, difference
from pipeline.replica import Replica


class Notes:
    """A book in memory."""

    def __init__(self) -> None:
        self.answers = {}

    def reference(self, kind, answers):
        return self.answers.setdefault(kind, answers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canary")
    return str(write_random_checkpoint(folder, hidden_size=64, vision_layers=1, tile=112))


@pytest.fixture(scope="module")
def settings(checkpoint) -> CanarySettings:
    config = load_config(checkpoint)
    template = Tokenizer.from_checkpoint(checkpoint).prompt_template("What is this?")
    vision = config.vision
    return CanarySettings(
        template, config.pinpoints, vision.image_size, vision.patch_size, "float32", "cpu"
    )


@pytest.fixture(scope="module")
def engine(checkpoint):
    with Engine(EngineConfig(checkpoint, device="cpu")) as engine:
        yield engine


def answer(engine: Engine, canary: Canary) -> None:
    canary.check(engine)


def test_the_first_replica_of_a_dataset_writes_the_book(engine, settings):
    book = Notes()
    answer(engine, Canary(settings, book))
    assert [len(a["logprobs"]) > 0 for a in book.answers["cpu"]] == [True, True]


def test_a_sound_replica_passes_again_and_again(engine, settings):
    book = Notes()
    watched = Canary(settings, book)
    for _ in range(3):
        answer(engine, watched)
    answer(engine, Canary(settings, book))


@pytest.mark.parametrize("part", ["vision_tower.layers.0", "layers.2.", "layers.7.", "lm_head"])
def test_a_replica_with_a_damaged_weight_is_found(engine, settings, part):
    book = Notes()
    answer(engine, Canary(settings, book))
    decoder = engine._ranks._rank.decoder  # type: ignore[union-attr]
    weights = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    weight = next(w for name, w in weights.items() if name.startswith(part) and w.ndim > 1)
    before = weight.detach().clone()
    try:
        weight.detach().view(-1)[: weight.numel() // 2] = 0
        with pytest.raises(WrongAnswerError, match="otherwise than before on cpu"):
            answer(engine, Canary(settings, book))
    finally:
        weight.detach().copy_(before)


def test_canaries_of_another_kind_of_device_are_not_compared(engine, settings):
    book = Notes()
    book.answers["cpu"] = [{"token_ids": [1], "logprobs": [-9.0]}] * 2
    answer(engine, Canary(replace(settings, kind="cuda H100 bfloat16"), book))
    with pytest.raises(WrongAnswerError):
        answer(engine, Canary(settings, book))


class Rounded(Canary):
    """Told other log-probabilities when it is asked among rows, as it is when it is `wanted`."""

    wanted, alone = False, 0

    @property
    def due(self):
        return self.wanted

    def requests(self):
        self.wanted = False
        return super().requests()

    def take(self, result):
        shifted = tuple(value - 1 for value in result.token_logprobs)
        return super().take(replace(result, token_logprobs=shifted))

    def check(self, engine):
        assert engine.unfinished == 0
        super().check(engine)
        self.alone += 1


def test_a_replica_that_rounds_otherwise_among_other_rows_is_not_taken_for_a_broken_one(
    checkpoint, settings
):
    """It is asked again when the rows that it has begun are done, and goes on with the others."""
    ends: list[str] = []
    watched = Rounded(settings, Notes())
    replica = Replica(EngineConfig(checkpoint, device="cpu"), watched, ends=ends.append)
    (request, _) = Canary(settings, Notes()).requests()
    for times in (2, 3):
        rows = [replace(request, id=f"row-{times}-{n}") for n in range(8)]
        answers = [replica.submit(row) for row in rows[:1]]
        watched.wanted = True
        answers += [replica.submit(row) for row in rows[1:]]
        assert [answer.result(timeout=60).id for answer in answers] == [row.id for row in rows]
        deadline = time.monotonic() + 60
        while watched.alone < times and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watched.alone == times  # once at the start
    assert ends == []


def test_an_answer_to_a_row_is_no_canary(engine, settings):
    watched = Canary(settings, Notes())
    (request, _) = watched.requests()
    (result,) = engine.generate([replace(request, id="row")])
    assert not watched.take(result)


def test_canaries_are_due_at_the_start_and_every_hour(settings, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(canary.time, "monotonic", lambda: clock[0])
    watched = Canary(settings, Notes())
    assert watched.due
    watched.requests()
    clock[0] += canary.HOUR - 1
    assert not watched.due
    clock[0] += 1
    assert watched.due


def test_only_what_rounding_cannot_explain_counts():
    one = CanaryAnswer((5, 6, 7), (-1.0, -2.0, -0.1))
    assert difference(one, one) == 0
    # Rounding took the other of two equals, and another text follows.
    assert difference(one, CanaryAnswer((5, 9, 8), (-1.0, -2.01, -7.0))) == pytest.approx(0.01)
    assert difference(one, CanaryAnswer((5, 9, 8), (-1.0, -4.0, -0.1))) == pytest.approx(2)
    assert difference(one, CanaryAnswer((5, 6, 7), (-1.0, float("nan"), -0.1))) == float("inf")
    assert difference(one, CanaryAnswer((), ())) == float("inf")


def test_the_picture_is_the_same_for_ever():
    tiles = canary.picture(3, 56)
    assert (tiles.shape, tiles.dtype.name) == ((3, 56, 56, 3), "uint8")
    assert hashlib.sha256(tiles.tobytes()).hexdigest()[:16] == "0118e97de570161b"


def test_a_replica_that_starts_wrong_answers_no_row(checkpoint, settings):
    book = Notes()
    book.answers["cpu"] = [{"token_ids": [1], "logprobs": [-9.0]}] * 2
    replica = Replica(EngineConfig(checkpoint, device="cpu"), Canary(settings, book))
    (request, _) = Canary(settings, Notes()).requests()
    with pytest.raises(WrongAnswerError, match="otherwise than before"):
        replica.submit(replace(request, id="row"))
