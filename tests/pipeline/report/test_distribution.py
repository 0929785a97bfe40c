"""Counted values against numpy over all of them."""

import numpy as np
import pytest

from pipeline.report.distribution import ValueCounts


@pytest.mark.parametrize("seed", range(5))
def test_counts_say_what_numpy_says_of_all_values(seed):
    rng = np.random.default_rng(seed)
    values = rng.lognormal(5, 1.5, 5000).astype(int).astype(float)
    counts = ValueCounts()
    for part in np.array_split(values, 7):
        counts.add(part)
    found = counts.distribution()
    assert found.count == 5000
    assert found.mean == pytest.approx(values.mean())
    for quantile, value in ((0.5, found.median), (0.95, found.p95)):
        assert value == np.quantile(values, quantile, method="inverted_cdf")
    edges = np.array(found.edges)
    inside = values[values < edges[-1]]
    assert list(found.counts) == np.histogram(inside, edges)[0].tolist()
    assert found.above == 5000 - len(inside)
    assert found.above <= 50


def test_a_value_on_an_edge_is_counted_once_also_when_rounding():
    counts = ValueCounts(0.001)
    counts.add(np.array([-0.5, -0.25, -0.25, 0.0, np.nan, -np.inf]))
    found = counts.distribution()
    assert (found.count, sum(found.counts), found.median, found.most) == (4, 4, -0.25, 0.0)


def test_one_value_only_is_one_bin():
    counts = ValueCounts()
    counts.add(np.full(3, 7.0))
    assert counts.distribution().counts == (3,)
    assert counts.distribution().edges == (7, 8)


def test_no_values_are_no_distribution():
    counts = ValueCounts()
    counts.add(np.array([np.nan]))
    assert counts.distribution().counts == ()
