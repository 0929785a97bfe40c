"""Who holds which layers: a contiguous span for each rank, so that none waits long for another.

The first rank also sees, the last one also chooses tokens, and layers differ. Everyone who asks
comes to the same spans: they depend on the model and the number of ranks alone.
"""

from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from math import inf

from model.config import VL01Config
from model.engine.cost import TYPICAL, Cost, weight_bytes
from schemas.errors import ConfigError

# What a rank may hold more of weights than if they were split by bytes alone: those bytes would
# have been states of sequences, and decode is slower with fewer of them.
_MORE_BYTES = 1.05
# What the slowest rank may take longer so that the weights are spread more evenly.
_MORE_SECONDS = 1.01


@cache
def layer_spans(model: VL01Config, ranks: int) -> tuple[range, ...]:
    """The layers of each rank, in order, at least one each.

    The slowest rank is as fast as it can be (within 1%) for a typical microbatch while none holds
    over 5% more weights than it must; among such splits the one that spreads the weights best.
    Raises ConfigError when there are more ranks than layers.
    """
    layers = model.text.num_layers
    if not 1 <= ranks <= layers:
        raise ConfigError(
            f"ranks is {ranks}, the model has {layers} layers; every rank holds at least one "
            f"layer: expected 1 to {layers}"
        )
    nanoseconds, nbytes = _costs(model)

    def seconds(span: range) -> float:
        return nanoseconds[span.stop] - nanoseconds[span.start]

    def size(span: range) -> float:
        return nbytes[span.stop] - nbytes[span.start]

    def worst(price: Callable[[range], float]) -> float:
        return max(map(price, _cheapest(layers, ranks, price, max)))

    most_bytes = _MORE_BYTES * worst(size)
    most_seconds = _MORE_SECONDS * worst(
        lambda span: seconds(span) if size(span) <= most_bytes else inf
    )

    def squared(span: range) -> float:
        fits = seconds(span) <= most_seconds and size(span) <= most_bytes
        return size(span) ** 2 if fits else inf

    return _cheapest(layers, ranks, squared, lambda one, other: one + other)


def busy_shares(model: VL01Config, spans: tuple[range, ...]) -> tuple[float, ...]:
    """How much of the time each rank computes if the slowest one always does, 0 to 1."""
    seconds = [Cost(model).seconds(span, TYPICAL) for span in spans]
    return tuple(one / max(seconds) for one in seconds)


@cache
def _costs(model: VL01Config) -> tuple[list[int], list[int]]:
    """Nanoseconds and bytes of the layers before each layer, vision and head with the first and the
    last. Whole numbers, so that all ranks split alike whatever their machines round."""
    cost, layers = Cost(model), [range(i, i + 1) for i in range(model.text.num_layers)]
    nanoseconds = [round(cost.seconds(layer, TYPICAL) * 1e9) for layer in layers]
    nbytes = [weight_bytes(model, layer) for layer in layers]
    return [0, *accumulate(nanoseconds)], [0, *accumulate(nbytes)]


def _cheapest(
    layers: int,
    ranks: int,
    price: Callable[[range], float],
    join: Callable[[float, float], float],
) -> tuple[range, ...]:
    """The spans whose prices, joined by max or sum, are least; of equal ones the first to the left.

    By dynamic programming: best[end] is the cheapest way to split the layers before `end` so far.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, (0,))}
    for rank in range(1, ranks + 1):
        best = {
            end: min(
                (join(before, price(range(start, end))), (*bounds, end))
                for start, (before, bounds) in best.items()
                if start < end
            )
            for end in range(rank, layers - ranks + rank + 1)
        }
    _, bounds = best[layers]
    return tuple(range(start, end) for start, end in pairwise(bounds))
