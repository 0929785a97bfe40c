"""Counts of a column's values, and the distribution they make. Exact, in bounded memory."""

from collections import Counter

import numpy as np

from schemas.report import Distribution

_BINS = 32
_TAIL = 0.99  # values beyond this quantile are not drawn when they would stretch the axis


class ValueCounts:
    """How often each value comes. `step` is what values are rounded to: 1 for whole numbers."""

    def __init__(self, step: float = 1.0) -> None:
        self._step = step
        self._counts: Counter[int] = Counter()
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        """values: any numbers; those that are not finite are left out."""
        values = values[np.isfinite(values)].astype(np.float64)
        self._sum += float(values.sum())
        found, counts = np.unique(np.rint(values / self._step).astype(np.int64), return_counts=True)
        self._counts.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def distribution(self) -> Distribution:
        if not self._counts:
            return Distribution(count=0)
        keys = np.array(sorted(self._counts), np.int64)
        counts = np.array([self._counts[key] for key in keys.tolist()], np.int64)
        total = int(counts.sum())
        below = np.cumsum(counts)

        def quantile(share: float) -> int:
            return int(keys[np.searchsorted(below, share * total)])

        first, last = int(keys[0]), int(keys[-1])
        tail = quantile(_TAIL)
        if last - first <= 1.5 * (tail - first):
            tail = last
        width = -(-(tail - first + 1) // _BINS)  # whole steps, so that no bin holds more of them
        bins = -(-(tail - first + 1) // width)
        within = keys < first + bins * width
        drawn = np.bincount((keys[within] - first) // width, counts[within], bins).astype(int)
        return Distribution(
            count=total,
            mean=self._sum / total,
            least=self._value(first),
            median=self._value(quantile(0.5)),
            p95=self._value(quantile(0.95)),
            most=self._value(last),
            edges=tuple(self._value(first + i * width) for i in range(bins + 1)),
            counts=tuple(drawn.tolist()),
            above=int(counts[~within].sum()),
        )

    def _value(self, key: int) -> float:
        return key if self._step == 1 else round(key * self._step, 6)
