"""Where a text ends: stop strings however tokens cut them, end of text, length."""

from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.engine.answer import Answer
from schemas.requests import FinishReason, Sampling

END, SILENT = 1000, 1001  # the end-of-text token, and a special token that stands for no text


def _vocabulary(pieces: Sequence[bytes]):
    """Token n is pieces[n]; decodes like a byte-level BPE."""

    def decode(ids: Sequence[int]) -> str:
        return b"".join(pieces[id] for id in ids if id < END).decode("utf-8", "replace")

    return decode


def _write(pieces: Sequence[bytes], ids: Sequence[int], **sampling) -> Answer:
    answer = Answer(Sampling(**sampling), (END,), _vocabulary(pieces))
    for id in ids:
        if answer.append(id, -1.0):
            break
    return answer


def _cut_slowly(text: str, stops: Sequence[str]) -> str:
    """Character by character, before the first stop string that is complete."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab€é\U0001f600", min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 6), min_size=1),
    stops=st.lists(st.text("ab€é\U0001f600", min_size=1, max_size=5), max_size=3),
)
@example(text="aab€b", cuts=[1], stops=["€"])
@example(text="ab", cuts=[2], stops=["b", "ab"])
def test_a_stop_string_is_found_however_tokens_cut_it_even_inside_a_character(text, cuts, stops):
    data, pieces = text.encode(), []
    while data:
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(data[:size])
        data = data[size:]
    answer = _write(pieces, range(len(pieces)), stop=tuple(stops), max_new_tokens=100)
    assert answer.text == _cut_slowly(text, stops)
    assert (answer.finish_reason == FinishReason.STOP) == any(stop in text for stop in stops)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(
            [b"a", b" bc", b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\xff", b"\xef\xbf\xbd"]
        ),
        min_size=1,
        max_size=30,
    ),
    stops=st.lists(st.sampled_from(["€", "b", "\ufffd", "ca"]), max_size=1),
)
def test_each_token_ends_where_the_text_ended_when_it_was_written(pieces, stops):
    answer = _write(pieces, [*range(len(pieces)), END], stop=tuple(stops), max_new_tokens=99)
    prefixes = [answer.token_ids[: n + 1] for n in range(len(answer.token_ids))]
    texts = [_cut_slowly(_vocabulary(pieces)(ids), stops) for ids in prefixes]
    assert answer.token_ends == [min(len(text), len(answer.text)) for text in texts]
    assert answer.token_ends[-1] == len(answer.text)


def test_a_stop_string_is_found_across_tokens_that_stand_for_no_text():
    answer = _write([b"x S", b"TO", b"P y"], [0, 1, SILENT, SILENT, 2], stop=("STOP",))
    assert answer.text == "x "
    assert answer.finish_reason == FinishReason.STOP


def test_broken_characters_do_not_hide_a_stop_string():
    pieces = [b"\xe2\x82", b"\xff", b"STOP", b"\xf0\x9f"]
    answer = _write(pieces, [0, 1, 1, 0, 2, 3], stop=("STOP",))
    assert answer.text == "���" + "�"
    assert answer.token_ids == [0, 1, 1, 0, 2]


def test_the_end_token_counts_as_written_and_is_not_in_the_text():
    answer = _write([b"one", b" two"], [0, 1, END], max_new_tokens=3)
    assert answer.finish_reason == FinishReason.STOP
    assert answer.text == "one two"
    assert answer.token_ids == [0, 1, END]
    assert answer.mean_logprob == -1.0


def test_an_empty_answer_has_an_empty_text():
    answer = _write([], [END])
    assert (answer.text, answer.token_ids, answer.mean_logprob) == ("", [END], -1.0)


def test_length_ends_a_text_in_the_middle_of_a_character():
    answer = _write([b"a", b"\xe2\x82"], [0, 1], max_new_tokens=2)
    assert answer.finish_reason == FinishReason.LENGTH
    assert answer.text == "a�"
