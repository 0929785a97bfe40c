"""Who holds which layers: a contiguous span for each rank."""

from itertools import pairwise

from schemas.errors import ConfigError


def layer_spans(layers: int, ranks: int) -> tuple[range, ...]:
    """The layers of each rank, in order; their numbers differ by one at most.

    Raises ConfigError when there are more ranks than layers.
    """
    if not 1 <= ranks <= layers:
        raise ConfigError(
            f"ranks is {ranks}, the model has {layers} layers; every rank holds at least one "
            f"layer: expected 1 to {layers}"
        )
    bounds = [rank * layers // ranks for rank in range(ranks + 1)]
    return tuple(range(start, end) for start, end in pairwise(bounds))
