"""A rank that has hung is found and blamed; one that is slow, loads or waits is left alone."""

from dataclasses import replace

import pytest

from model.engine.messages import Alive
from model.engine.vital_signs import VitalSigns, hung

COMPUTING = Alive("computing microbatch 7", progress=0, waits=False, busy_seconds=0.0)
WAITING = Alive("waiting for microbatch 7", progress=0, waits=True, busy_seconds=0.0)
LOADING = Alive("loading its layers", progress=None, waits=True, busy_seconds=0.0)


def after(seconds: int, *ranks: Alive | None, growing: tuple[int, ...] = ()) -> dict[int, str]:
    """The verdict when these are all that the ranks have said, each second, for so long; None is no
    answer after a first one. The progress of those that are `growing` grows every 20 s."""
    signs = [VitalSigns() for _ in ranks]
    for each in signs:
        each.heard(COMPUTING)
    for second in range(1, seconds + 1):
        for rank, (said, each) in enumerate(zip(ranks, signs, strict=True)):
            each.passed(1.0)
            if said is not None:
                grown = second // 20 if rank in growing else 0
                each.heard(replace(said, progress=grown) if said.progress is not None else said)
    return hung(signs, patience=30)


def test_a_rank_that_does_not_answer_is_hung_whatever_the_others_do():
    for others in (COMPUTING, WAITING, LOADING):
        assert after(30, None, others, growing=(1,)) == {}
        assert after(31, None, others, growing=(1,)) == {
            0: "no answer for 31 s, was computing microbatch 7"
        }


def test_the_rank_that_comes_no_further_is_blamed_and_not_those_that_wait_for_it():
    assert after(30, WAITING, COMPUTING, WAITING) == {}
    assert after(31, WAITING, COMPUTING, WAITING) == {
        1: "no progress for 31 s, is computing microbatch 7"
    }


def test_ranks_that_all_wait_for_each_other_are_hung():
    assert after(31, WAITING, WAITING).keys() == {0, 1}


@pytest.mark.parametrize("seconds", [60, 6000])
def test_a_slow_rank_is_not_hung_and_neither_are_those_that_wait_for_it(seconds):
    assert after(seconds, WAITING, COMPUTING, WAITING, growing=(1,)) == {}


def test_ranks_may_load_for_hours():
    assert after(20_000, LOADING, LOADING) == {}
    assert after(20_000, WAITING, LOADING) == {}


def test_a_process_gets_its_time_to_start_but_not_for_ever():
    signs = [VitalSigns(), VitalSigns()]
    for each in signs:
        each.passed(300.0)
    signs[1].heard(LOADING)
    assert hung(signs, patience=30) == {}
    signs[0].passed(1.0)
    assert hung(signs, patience=30) == {0: "no answer for 301 s, was starting"}


def test_time_in_which_nobody_waited_for_the_ranks_does_not_count():
    signs = VitalSigns()
    signs.heard(WAITING)
    assert hung([signs], patience=0) == {}
