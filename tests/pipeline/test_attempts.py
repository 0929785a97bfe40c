"""The ladder: what is asked next, which answer is kept, and that it ends."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import ladder
from model.inputs.prompt import PromptTemplate
from model.inputs.tiling import choose_layout
from model.inputs.turning import Turner
from pipeline.attempts import Attempts, Climb
from pipeline.generate import answer_columns
from schemas.errors import Reason, RowError
from schemas.ladder import Cause, Step
from schemas.requests import FinishReason, Request, Result, Sampling

PINPOINTS = ((56, 56), (112, 56), (56, 112), (112, 112))
TEMPLATE = PromptTemplate((1, 2), (3,), 9)
TURNER = Turner(TEMPLATE, PINPOINTS, 56, 14)
SIZE = (60, 100)

STOP, LENGTH, CIRCLES = FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION


def answer(text: str = "fine", logprob: float = -0.1, finish: FinishReason = STOP) -> Result:
    return Result("", text, (1, 2, 3), finish, 7, logprob, (logprob,) * 3, (1, 2, 3))


def attempts(
    steps: Sequence[Step], retries: int | None = None, judge=lambda r: answer_columns(r, None)
) -> Attempts:
    layout = choose_layout(*SIZE, PINPOINTS, 56, 14)
    tiles = np.random.default_rng(0).integers(0, 256, (layout.tiles, 56, 56, 3), np.uint8)
    first = Request("row", TEMPLATE.fill(layout.tokens), tiles, SIZE, Sampling(100, 0.0, seed=5))
    return Attempts(first, judge, lambda number: 1000 + number, Climb(steps, retries, TURNER))


def climb(tried: Attempts, answers: Sequence[Result]) -> list[Request]:
    """The requests that follow the first, answered in turn by the rest of the answers."""
    asked = []
    for result in answers:
        again = tried.next(result)
        if again is None:
            break
        asked.append(again)
    return asked


def same_tiles(one: Request, other: Request) -> bool:
    assert one.tiles is not None
    assert other.tiles is not None
    return np.array_equal(one.tiles, other.tiles)


def test_a_good_answer_is_asked_for_once():
    tried = attempts(ladder.PAGE)
    assert tried.next(answer()) is None
    assert tried.columns() == {**answer_columns(answer(), None), "row_id": "row", "attempts": 1}


def test_a_loop_is_tried_again_with_another_temperature_and_seed():
    tried = attempts(ladder.PAGE)
    (again,) = climb(tried, [answer("abab", finish=CIRCLES), answer("fine")])
    assert (again.sampling.temperature, again.sampling.seed) == (0.4, 1002)
    assert again.sampling.max_new_tokens == 100
    assert again.id == "row#2"
    assert np.array_equal(again.token_ids, tried.first.token_ids)
    assert (tried.columns()["text"], tried.columns()["attempts"]) == ("fine", 2)
    assert "reason" not in tried.columns()


def test_an_answer_cut_at_its_limit_gets_a_longer_one_and_the_longer_is_kept():
    tried = attempts(ladder.PAGE)
    cut = answer("half", -0.1, LENGTH), answer("nearly all", -0.2, LENGTH)
    (again,) = climb(tried, cut)
    assert again.sampling.max_new_tokens == 200
    assert tried.columns()["text"] == "nearly all"
    assert tried.columns()["reason"] == Reason.MAX_NEW_TOKENS


def test_a_page_on_its_head_is_turned_until_the_model_is_sure_and_says_so():
    tried = attempts(ladder.PAGE)
    first = tried.first
    asked = climb(tried, [answer("?", -3.0), answer("?!", -2.5), answer("right", -0.2)])
    assert len(asked) == 2
    assert same_tiles(asked[0], TURNER.turn(first, 180))
    assert same_tiles(asked[1], TURNER.turn(first, 90))
    assert asked[1].image_size == (100, 60)
    columns = tried.columns()
    assert (columns["text"], columns["attempts"]) == ("right", 3)
    assert columns["message"] == "turned 90 degrees clockwise"
    assert (columns["width"], columns["height"]) == (100, 60)
    layout = choose_layout(100, 60, PINPOINTS, 56, 14)
    assert (columns["tiles"], columns["image_tokens"]) == (layout.tiles, layout.tokens)


def test_the_best_of_all_turns_is_kept_and_it_may_be_the_first():
    tried = attempts(ladder.PAGE)
    asked = climb(
        tried, [answer(t, p) for t, p in (("a", -2.0), ("b", -3), ("c", -2.5), ("d", -4))]
    )
    assert len(asked) == 3
    assert (tried.columns()["text"], tried.columns()["attempts"]) == ("a", 4)
    assert tried.columns().get("message") is None
    assert "width" not in tried.columns()


def test_a_sure_answer_that_was_cut_beats_nonsense_that_ended_and_stays_turned_to_be_finished():
    tried = attempts(ladder.PAGE)
    answers = [answer("?", -3.0), answer("text", -0.1, LENGTH), answer("text and more", -0.2)]
    turned, longer = climb(tried, answers)
    assert [r.sampling.max_new_tokens for r in (turned, longer)] == [100, 200]
    assert same_tiles(longer, turned)
    assert tried.columns()["text"] == "text and more"
    assert tried.columns()["message"] == "turned 180 degrees clockwise"


def test_an_empty_answer_never_replaces_a_text():
    tried = attempts(ladder.PAGE)
    climb(tried, [answer("faint", -1.5), answer("", -0.01), answer(".", -0.01), answer("", -0.01)])
    assert tried.columns()["text"] == "faint"


def test_an_empty_answer_is_believed_unless_a_turned_page_is_surer():
    no_text = attempts(ladder.PAGE)
    climb(no_text, [answer(" -\n", -0.2), answer("x", -2), answer("y", -1.5), answer("z", -0.9)])
    assert no_text.columns()["text"] == " -\n"
    upside_down = attempts(ladder.PAGE)
    climb(upside_down, [answer("", -0.7), answer("It is all here", -0.1)])
    assert upside_down.columns()["text"] == "It is all here"


def test_what_ended_by_itself_beats_what_broke_the_schema_beats_what_was_cut():
    step = Step(when=tuple(Cause), unsure_below=0)

    def judge(result: Result) -> dict:
        broken = {"reason": Reason.INVALID_JSON} if result.text == "{" else {}
        return {**answer_columns(result, None), **broken}

    texts = []
    for tries in (
        [answer("ab", -0.1, CIRCLES), answer("cut", -2, LENGTH)],
        [answer("cut", -0.1, LENGTH), answer("{", -2)],
        [answer("{", -0.1), answer("ok", -2)],
        [answer("ok", -2), answer("cut", -0.1, LENGTH)],
    ):
        tried = attempts([step], judge=judge)
        climb(tried, tries)
        texts.append(tried.columns()["text"])
    assert texts == ["cut", "{", "ok", "ok"]


@pytest.mark.parametrize(("retries", "expected"), [(0, 1), (1, 2), (3, 4), (None, 6), (99, 6)])
def test_retries_bounds_the_ladder(retries, expected):
    tried = attempts(ladder.PAGE, retries)
    again, turns = tried.first, 0
    while again is not None:
        # Going in circles first, then cut: a cause for every step.
        again = tried.next(answer("a", -5 + 0.1 * turns, CIRCLES if turns < 4 else LENGTH))
        turns += 1
        assert turns < 20
    assert turns == tried.count == expected


def test_a_longer_answer_that_does_not_fit_leaves_the_best_so_far():
    tried = attempts(ladder.PAGE)
    assert tried.next(answer("half", -0.1, LENGTH))
    assert tried.refused(RowError(Reason.PROMPT_TOO_LONG, "too long")) is None
    assert tried.columns()["text"] == "half"
    assert tried.columns()["attempts"] == 1


def test_a_row_that_the_engine_refuses_is_not_tried_again():
    tried = attempts(ladder.PAGE)
    assert tried.refused(RowError(Reason.PROMPT_TOO_LONG, "too long")) is None
    assert tried.columns() == {
        "row_id": "row",
        "attempts": 0,
        "reason": Reason.PROMPT_TOO_LONG,
        "message": "too long",
    }


steps = st.builds(
    Step,
    when=st.lists(st.sampled_from(list(Cause)), min_size=1, max_size=3).map(tuple),
    temperature=st.one_of(st.none(), st.floats(0, 2)),
    more_tokens=st.floats(0.01, 16),
    turn=st.sampled_from([None, 90, 180, 270]),
    unsure_below=st.floats(-5, 0),
)
results = st.builds(
    answer, st.sampled_from(["", "a", "text"]), st.floats(-6, 0), st.sampled_from(FinishReason)
)


@settings(max_examples=150, deadline=None)
@given(ladder=st.lists(steps, max_size=6), answers=st.lists(results, min_size=7, max_size=7))
def test_any_ladder_ends_and_keeps_an_answer_that_was_given(ladder, answers):
    tried = attempts(ladder)
    asked = climb(tried, answers)
    assert len(asked) <= len(ladder)
    assert tried.count == len(asked) + 1
    assert len({request.id for request in asked} | {"row"}) == tried.count
    assert tried.best is not None
    assert tried.best.result in answers[: tried.count]
    assert all(request.sampling.max_new_tokens >= 1 for request in asked)
    again = attempts(ladder)
    assert [r.sampling for r in climb(again, answers)] == [r.sampling for r in asked]
