"""Answers by image: one computes, the others wait or copy, and memory stays bounded."""

import pytest

from pipeline.copies import Copies


def columns(text: str = "text") -> dict:
    return {"text": text}


def test_the_first_computes_and_who_asks_meanwhile_gets_the_same_answer():
    copies = Copies()
    answer, first = copies.claim("a")
    waiting, second = copies.claim("a")
    assert (first, second) == (True, False)
    assert not waiting.done()
    copies.settle("a", columns())
    assert answer.result() == waiting.result() == columns()
    later, again = copies.claim("a")
    assert not again
    assert later.result() == columns()


def test_a_failure_is_told_to_those_who_wait_and_kept_for_nobody():
    copies = Copies()
    copies.claim("a")
    waiting, _ = copies.claim("a")
    copies.settle("a", {"reason": "prompt_too_long"})
    assert waiting.result()["reason"] == "prompt_too_long"
    assert copies.claim("a")[1]


def test_whoever_waits_for_a_batch_that_broke_breaks_too_and_the_next_computes():
    copies = Copies()
    copies.claim("a")
    waiting, _ = copies.claim("a")
    copies.give_up("a", ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        waiting.result(timeout=1)
    assert copies.claim("a")[1]


def test_what_was_asked_for_longest_ago_is_forgotten_first_and_memory_is_bounded():
    copies = Copies(most_bytes=100_000)
    for key in "abc":
        copies.claim(key)
        copies.settle(key, columns("x" * 7000))  # about 29 kB
    copies.claim("a")
    copies.claim("d")
    copies.settle("d", columns("x" * 7000))
    assert [copies.claim(key)[1] for key in "acdb"] == [False, False, False, True]


def test_an_answer_that_is_being_computed_is_never_forgotten():
    copies = Copies(most_bytes=10_000)
    copies.claim("slow")
    for number in range(100):
        copies.claim(str(number))
        copies.settle(str(number), columns("x" * 1000))
    assert not copies.claim("slow")[1]


def test_an_answer_too_large_to_keep_is_still_given_to_those_who_wait():
    copies = Copies(most_bytes=10)
    waiting, _ = copies.claim("a")
    copies.settle("a", columns("long"))
    assert waiting.result() == columns("long")
    assert copies.claim("a")[1]
