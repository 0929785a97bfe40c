"""Which rows go on the contact sheet: half by chance, half by risk. Sees each row once.

A row is chosen when its key is among the smallest of its kind, so parts may come in any order. The
keys of chance depend on the seed, the unit and the place in it: the same dataset, the same sheet.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from schemas.rows import Status

EACH = 24  # rows by chance, and as many by risk
RANDOM = "random"


class Pick(NamedTuple):
    """A row by its place, and why it was chosen."""

    unit: int
    position: int
    why: str


class Columns(NamedTuple):
    """Columns of consecutive rows of a part; numbers are float64, NaN for null."""

    unit: int
    first: int  # position of the first of them
    status: np.ndarray  # str
    attempts: np.ndarray
    length: np.ndarray  # characters of the text
    mean_logprob: np.ndarray


class _Smallest:
    """The rows with the smallest keys."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, int, int]] = []

    def add(self, keys: np.ndarray, wanted: np.ndarray, unit: int, first: int) -> None:
        positions = np.flatnonzero(wanted)
        order = np.argsort(keys[positions], kind="stable")[:EACH]
        new = [(float(keys[i]), unit, first + int(i)) for i in positions[order]]
        self._kept = sorted(self._kept + new)[:EACH]

    def rows(self) -> Iterator[tuple[int, int]]:
        for _, unit, position in self._kept:
            yield unit, position


class Sample:
    """Takes columns part by part; `picks` are the rows chosen of all of them."""

    # The gravest first. Rows of each kind are taken in turns until the sheet is full.
    RISKS = (
        *("failed", "breaks the schema", "truncated", "retried"),
        *("least confident", "short", "long"),
    )

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._kinds = {kind: _Smallest() for kind in (RANDOM, *self.RISKS)}

    def add(self, rows: Columns) -> None:
        chance = np.random.default_rng([self._seed, rows.unit, rows.first]).random(len(rows.status))
        ok = rows.status == Status.OK
        keys_and_wanted = {
            RANDOM: (chance, np.ones(len(chance), bool)),
            "failed": (chance, rows.status == Status.FAILED),
            "breaks the schema": (chance, rows.status == Status.INVALID),
            "truncated": (chance, rows.status == Status.TRUNCATED),
            "retried": (chance, rows.attempts > 1),
            "least confident": (rows.mean_logprob, np.isfinite(rows.mean_logprob)),
            "short": (rows.length + chance / 2, ok),
            "long": (chance / 2 - rows.length, ok),
        }
        for kind, (keys, wanted) in keys_and_wanted.items():
            self._kinds[kind].add(keys, wanted, rows.unit, rows.first)

    def picks(self) -> list[Pick]:
        """Those by chance, then those by risk; no row twice."""
        taken = dict.fromkeys(self._kinds[RANDOM].rows(), RANDOM)
        most = 2 * EACH if len(taken) == EACH else 0  # a smaller dataset is shown whole already
        left = [(kind, self._kinds[kind].rows()) for kind in self.RISKS]
        while left and len(taken) < most:
            for kind, rows in list(left):
                place = next((row for row in rows if row not in taken), None)
                if place is None:
                    left.remove((kind, rows))
                elif len(taken) < most:
                    taken[place] = kind
        return [Pick(*place, why) for place, why in taken.items()]
