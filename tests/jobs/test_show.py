"""What a run says at its end."""

import pytest

from jobs import show
from schemas.report import Summary


@pytest.mark.parametrize(
    ("measured", "at_most", "said"),
    [
        ((0.93, 0.88), (1.0, 0.97), "busy 93%, 88% of the time since the model was loaded; fore"),
        ((0.93, 0.88), (), "busy 93%, 88% of the time since the model was loaded\n"),
        ((0.93,), (1.0,), ""),
        ((), (), ""),
    ],
)
def test_ranks_that_wait_for_each_other_are_seen(capsys, measured, at_most, said):
    show.summary(
        Summary("out", 1, {"ok": 3}, rank_busy=measured, rank_busy_at_most=at_most, seconds=1.0)
    )
    shown = capsys.readouterr().out
    assert said in shown
    assert ("ranks" in shown) == bool(said)


def test_replicas_that_ended_are_not_passed_over(capsys):
    show.summary(Summary("out", 1, {"ok": 3}, restarts=2))
    assert "replicas started again 2 times" in capsys.readouterr().out
    show.summary(Summary("out", 1, {"ok": 3}))
    assert "replicas" not in capsys.readouterr().out


def test_the_time_of_loading_does_not_pass_for_the_speed_of_the_model(capsys):
    show.summary(Summary("out", 1, {"ok": 512}, seconds=83.0, loaded_seconds=34.0))
    told = "83.0 s, 6.17 rows/s; with the model loaded, 34.0 s, 15.06 rows/s"
    assert told in " ".join(capsys.readouterr().out.split())


def test_tokens_that_no_replica_computed_are_told_apart(capsys):
    show.summary(Summary("out", 1, {"ok": 3}, prompt_tokens=60, output_tokens=9, copied_tokens=46))
    assert "60 read, 9 written, 46 of both copied" in capsys.readouterr().out
    show.summary(Summary("out", 1, {"ok": 3}, prompt_tokens=60, output_tokens=9))
    assert "60 read, 9 written\n" in capsys.readouterr().out
