import pytest

from model.engine.ranks import layer_spans
from schemas.errors import ConfigError


@pytest.mark.parametrize(("layers", "ranks"), [(80, 4), (80, 8), (8, 3), (7, 7), (1, 1), (16, 5)])
def test_no_layer_is_held_twice_or_by_nobody_and_no_rank_holds_two_more_than_another(layers, ranks):
    spans = layer_spans(layers, ranks)
    assert [layer for span in spans for layer in span] == list(range(layers))
    lengths = [len(span) for span in spans]
    assert len(lengths) == ranks
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("ranks", [0, 9])
def test_more_ranks_than_layers_are_refused(ranks):
    with pytest.raises(ConfigError, match=f"ranks is {ranks}, the model has 8 layers"):
        layer_spans(8, ranks)
