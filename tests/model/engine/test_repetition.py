"""When an answer goes in circles: loops end soon, and whatever a page may hold does not."""

import random
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.answer import Answer
from model.engine.repetition import FEW, LINES, MOST_PERIOD, STRIDE, tokens_that_repeat
from schemas.requests import FinishReason, Sampling

END = 10**6


def decode_characters(ids: Sequence[int]) -> str:
    """A token a character: text is easily written as tokens."""
    return "".join(map(chr, ids))


def decode_nothing(ids: Sequence[int]) -> str:
    return ""


def write(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str] = decode_characters, watch=True
) -> Answer:
    answer = Answer(
        Sampling(max_new_tokens=100_000, stop_repetition=watch, temperature=0.0), (END,), decode
    )
    for id in ids:
        if answer.append(id, -1.0):
            break
    return answer


def write_text(text: str) -> Answer:
    return write([ord(character) for character in text])


def words(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(n))


def repeats_slowly(ids: list[int]) -> int | None:
    """After how many tokens a loop must be seen: every length and every period, token by token."""
    for end in range(STRIDE, len(ids) + 1, STRIDE):
        for period in range(1, MOST_PERIOD + 1):
            run = 0
            while run < end - period and ids[end - 1 - run] == ids[end - 1 - run - period]:
                run += 1
            if run >= tokens_that_repeat(period):
                return end
    return None


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    before=st.integers(0, 200),
    period=st.integers(1, 60),
    length=st.integers(0, 1000),
    alphabet=st.sampled_from([2, 5, 1000]),
)
def test_loops_end_where_the_slow_twin_ends_them(seed, before, period, length, alphabet):
    rng = random.Random(seed)
    span = [rng.randrange(alphabet) for _ in range(period)]
    ids = [rng.randrange(alphabet) for _ in range(before)]
    ids += (span * (length // period + 1))[:length] + [rng.randrange(alphabet) for _ in range(40)]
    answer = write(ids, decode_nothing)
    assert len(answer.token_ids) == (repeats_slowly(ids) or len(ids))
    assert (answer.finish_reason == FinishReason.REPETITION) == bool(repeats_slowly(ids))


@pytest.mark.parametrize("period", [1, 2, 3, 7, 12, 40, 100, 256, 300, MOST_PERIOD])
def test_a_loop_ends_soon_and_leaves_its_first_round(period):
    before, span = list(range(1000, 1100)), list(range(period))
    answer = write(before + span * 4000, decode_nothing)
    assert answer.finish_reason == FinishReason.REPETITION
    written = len(answer.token_ids)
    assert written <= 100 + period + tokens_that_repeat(period) + STRIDE - 1
    kept = decode_characters(answer.token_ids)
    answer = write(before + span * 4000)
    assert answer.text == decode_characters(before + span)
    assert kept.startswith(answer.text)
    assert answer.token_ends[-1] == len(answer.text)


def test_the_rounds_of_a_loop_do_not_make_an_answer_look_sure():
    answer = Answer(Sampling(max_new_tokens=9999, stop_repetition=True), (END,), decode_nothing)
    for id in range(100):
        answer.append(id, -2.0)
    while not answer.append(7, 0.0):
        pass
    # 100 tokens at -2; the 7 at 100 starts the loop and stays.
    assert answer.mean_logprob == pytest.approx(-200 / 101)


@pytest.mark.parametrize("seed", range(5))
def test_a_few_lines_in_no_order_are_a_loop(seed):
    rng = random.Random(seed)
    lines = ["the first", "", "and the other one", "a third"]
    loop = "\n".join(rng.choice(lines) for _ in range(1000))
    answer = write_text(words(50) + "\n" + loop)
    assert answer.finish_reason == FinishReason.REPETITION
    assert all(line in answer.text for line in lines)
    assert len(answer.text) < len(words(50)) + 30 * 20


def test_a_character_cut_by_the_stride_does_not_hide_a_line():
    def decode(ids: Sequence[int]) -> str:  # a token a byte
        return bytes(ids).decode("utf-8", "replace")

    rng = random.Random(3)
    lines = [line.encode() for line in ("€\n", "€€\n", "ä€\n")]
    data = b"".join(rng.choice(lines) for _ in range(3000))
    answer = write(list(data), decode)
    assert answer.finish_reason == FinishReason.REPETITION
    assert len(answer.token_ids) < LINES * 7 + 2 * STRIDE


ROW = "| 0 | 0 | 0 | 0 |\n"


def write_as_tokenizers_do(text: str) -> tuple[Answer, int]:
    """The answer, ended by END, and its number of tokens: words, marks, runs of dots or lines."""
    pieces = re.findall(r"\.{1,4}|_{1,8}| ?\w+| ?\||\s|[^\w\s]", text)
    vocabulary = list(dict.fromkeys(pieces))
    ids = [vocabulary.index(piece) for piece in pieces]
    answer = write([*ids, END], lambda ids: "".join(vocabulary[id] for id in ids if id != END))
    return answer, len(ids) + 1


HARMLESS = {
    "a dotted leader of a character a token": words(20) + " " + "." * 150 + " 12\n" + words(20),
    "a table of contents": "".join(f"{words(4, i)} {'.' * 80} {i}\n" for i in range(60)),
    "spaced dots": "".join(f"{words(3, i)}" + " ." * 70 + f" {i}\n" for i in range(50)),
    "sixty rows of zeros": "| a | b | c | d |\n|---|---|---|---|\n" + ROW * 60 + words(30),
    "an empty form": "| Name | Date | Signed |\n|---|---|---|\n" + "|  |  |  |\n" * 60,
    "a wide separator": "|" + "---|" * 40 + "\n" + words(40),
    "lines to write on": words(9) + "\n" + ("_" * 80 + "\n") * 40,
    "a sheet of labels": (words(8, 5) + "\n\n") * 30 + "page 1",
    "four equal receipts": (words(150, 3) + "\n\n") * 4,
    "a column of zeros": "0\n" * 90 + "total 0",
    "boxes to tick": "".join(f"{words(6, i)}\n[ ] yes\n[ ] no\n" for i in range(60)),
    "a chorus": "".join(words(40, i) + "\n" + words(25, 99) + "\n" for i in range(8)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_page_may_hold_is_no_loop(name):
    answer, tokens = write_as_tokenizers_do(HARMLESS[name])
    assert answer.finish_reason == FinishReason.STOP
    assert len(answer.token_ids) == tokens


def test_an_empty_table_that_never_ends_is_a_loop():
    answer, _ = write_as_tokenizers_do(ROW * 1000)
    assert answer.finish_reason == FinishReason.REPETITION
    assert answer.text == ROW


@pytest.mark.parametrize("extra", [0, 1])
def test_the_number_of_lines_that_makes_a_loop(extra):
    rng = random.Random(1)
    lines = [f"line {i}" for i in range(FEW + extra)]
    answer = write_text("".join(rng.choice(lines) + "\n" for _ in range(400)))
    assert (answer.finish_reason == FinishReason.REPETITION) == (extra == 0)


def test_nothing_is_cut_unless_asked_for():
    assert write([5] * 5000, watch=False).finish_reason is None
