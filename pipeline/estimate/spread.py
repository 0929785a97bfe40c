"""Percentiles and totals of a weighted sample."""

from collections.abc import Sequence

import numpy as np

from schemas.estimate import Spread


def spread(counts: Sequence[tuple[int, float]]) -> Spread:
    """counts: (a count, how many rows have it). With weights of 1 it is exact.

    A percentile is the smallest count that as many rows do not exceed.
    """
    if not counts:
        return Spread(0, 0, 0)
    values, weights = np.array(sorted(counts)).T
    reached = np.cumsum(weights)
    median, p95 = (
        int(values[np.searchsorted(reached, share * reached[-1])]) for share in (0.5, 0.95)
    )
    return Spread(median, p95, round(float(values @ weights)))
