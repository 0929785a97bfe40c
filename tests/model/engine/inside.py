"""For tests that look into an engine whose one rank is in its own process."""

from model.engine.engine import Engine
from model.engine.rank import Rank
from model.engine.rank_in_process import RankInProcess


def rank_of(engine: Engine) -> Rank:
    ranks = engine._ranks
    assert isinstance(ranks, RankInProcess)
    return ranks._open_rank
