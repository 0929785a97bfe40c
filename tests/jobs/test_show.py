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
