"""No layer is lost, no rank starved, and none waits longer for another than it must."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from model.config import VL01Config, load_config
from model.engine.cost import TYPICAL, Cost, weight_bytes
from model.engine.ranks import busy_shares, layer_spans
from model.nano.random_checkpoint import RELEASED_SIZES, NanoSizes, write_configuration
from schemas.errors import ConfigError


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """sizes -> VL01Config"""

    def make(sizes: NanoSizes) -> VL01Config:
        folder = tmp_path_factory.mktemp("model")
        write_configuration(folder, sizes)
        return load_config(folder)

    return make


@pytest.fixture(scope="module")
def released(model_of) -> VL01Config:
    return model_of(RELEASED_SIZES)


@pytest.mark.parametrize(("layers", "ranks"), [(8, 3), (7, 7), (1, 1), (16, 5), (40, 39)])
def test_no_layer_is_held_twice_or_by_nobody_and_no_rank_is_left_without(model_of, layers, ranks):
    spans = layer_spans(model_of(NanoSizes(layers=layers)), ranks)
    assert [layer for span in spans for layer in span] == list(range(layers))
    assert len(spans) == ranks
    assert all(spans)


@pytest.mark.parametrize("ranks", [0, 9])
def test_more_ranks_than_layers_are_refused(model_of, ranks):
    with pytest.raises(ConfigError, match=f"ranks is {ranks}, the model has 8 layers"):
        layer_spans(model_of(NanoSizes(layers=8)), ranks)


@pytest.mark.parametrize("ranks", [2, 4, 5, 8, 10])
def test_the_released_layers_are_split_evenly_where_they_can_be(released, ranks):
    """Vision costs half a layer, the head a quarter: less than a whole layer to give away."""
    spans = layer_spans(released, ranks)
    assert [len(span) for span in spans] == [80 // ranks] * ranks
    assert min(busy_shares(released, spans)) > 0.93
    assert max(busy_shares(released, spans)) == 1


@pytest.mark.parametrize("ranks", [3, 6, 7])
def test_the_first_rank_sees_and_the_last_one_chooses_so_others_take_the_layers_left_over(
    released, ranks
):
    lengths = [len(span) for span in layer_spans(released, ranks)]
    assert lengths[0] == 80 // ranks
    assert max(lengths) == 80 // ranks + 1
    if ranks > 3:
        assert lengths[-1] == 80 // ranks


def test_a_costly_tower_gets_fewer_layers_beside_it(model_of):
    sizes = replace(RELEASED_SIZES, vision_hidden_size=2048, vision_intermediate_size=8192)
    lengths = [len(span) for span in layer_spans(model_of(sizes), 8)]
    assert lengths[0] < min(lengths[1:])


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_no_split_is_faster_among_those_that_need_no_more_memory(model_of, ranks):
    """Every split there is, tried one by one."""
    model = model_of(replace(RELEASED_SIZES, layers=13))
    layers = [range(layer, layer + 1) for layer in range(13)]
    seconds = [Cost(model).seconds(layer, TYPICAL) for layer in layers]
    nbytes = [weight_bytes(model, layer) for layer in layers]

    def worst(spans, prices) -> float:
        return max(sum(prices[layer] for layer in span) for span in spans)

    splits = [
        [range(start, end) for start, end in pairwise((0, *inner, 13))]
        for inner in combinations(range(1, 13), ranks - 1)
    ]
    most = 1.05 * min(worst(spans, nbytes) for spans in splits)
    fastest = min(worst(spans, seconds) for spans in splits if worst(spans, nbytes) <= most)
    spans = layer_spans(model, ranks)
    assert worst(spans, nbytes) <= most
    assert worst(spans, seconds) <= 1.01 * fastest * (1 + 1e-6)
