"""A sample of the source: each unit is counted, a few of each kind are looked into.

What is looked into is an image file, a document, an address, a tar, or a slice of a Parquet file;
rows that lie together in it are a cluster. A kind with few of these is looked into whole. Holds the
sample alone, however large the source is.
"""

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from model.inputs.tiling import Layout
from pipeline.estimate.headers import Cluster, HeaderReader
from schemas.errors import Reason
from schemas.ledger import Unit, UnitKind

HEADERS = 1024  # of each kind: the mean of the tokens then errs by 1.5%, one standard error
_PLACES = {
    UnitKind.IMAGES: HEADERS,
    UnitKind.DOCUMENTS: 256,
    UnitKind.TAR: 64,
    UnitKind.PARQUET: 64,
    UnitKind.LIST: 256,  # each is fetched whole, maybe from a slow server
}
_BATCH = {UnitKind.IMAGES: 1, UnitKind.DOCUMENTS: 16}  # files looked into by one call
# Parquet images are read whole, sixteen at a time; of the others the headers alone. Documents take
# a renderer for each thread, also those in a tar.
_THREADS = {
    UnitKind.IMAGES: 32,
    UnitKind.DOCUMENTS: 4,
    UnitKind.TAR: 16,
    UnitKind.PARQUET: 2,
    UnitKind.LIST: 16,
}
_SEED = 0


class Seen(NamedTuple):
    """One row that was looked at, and how many rows of the source it stands for."""

    what: Layout | Reason
    weight: float


@dataclass
class Kind:
    """The units of one kind. rows: as far as planning counted them. places: how many there are to
    look into; kept: some of them."""

    most: int
    rows_known: bool = True
    units: int = 0
    rows: int = 0
    places: int = 0
    kept: list[Unit | str] = field(default_factory=list)  # a name is a file of its own
    _random: random.Random = field(default_factory=lambda: random.Random(_SEED))

    def add(self, place: Unit | str) -> None:
        """Each place is kept with the same probability, in one pass (reservoir sampling)."""
        self.places += 1
        if self.places <= self.most:
            self.kept.append(place)
        elif (slot := self._random.randrange(self.places)) < self.most:
            self.kept[slot] = place


@dataclass(frozen=True)
class Survey:
    """The rows of one kind: how many, which were seen, whether that is all of them, and whether
    any of them are pages of documents."""

    units: int
    rows: float
    rows_known: bool
    seen: list[Seen]
    whole: bool
    pages: bool


def survey(units: Iterable[Unit], headers: HeaderReader, seconds: float) -> dict[UnitKind, Survey]:
    """Looks into a sample of the units: once so many seconds are over, only to the end of what is
    begun. Raises what iterating over them raises."""
    kinds = {kind: found for kind, found in _count(units).items() if found.units}
    return {
        kind: _survey(kind, found, headers, seconds / len(kinds)) for kind, found in kinds.items()
    }


def _count(units: Iterable[Unit]) -> dict[UnitKind, Kind]:
    kinds = {kind: Kind(most) for kind, most in _PLACES.items()}
    for unit in (unit for unit in units if unit.rows != 0):
        kind = kinds[unit.kind]
        kind.units += 1
        kind.rows += _planned_rows(unit)
        # A Parquet file that could not be planned is one row, which planning knows as well.
        kind.rows_known &= unit.rows is not None or unit.kind is UnitKind.PARQUET
        for place in _places(unit):
            kind.add(place)
    return kinds


def _planned_rows(place: Unit | str) -> int:
    """Documents count as one each."""
    return 1 if isinstance(place, str) else place.rows or len(place.items)


def _places(unit: Unit) -> Iterable[Unit | str]:
    if unit.kind in _BATCH:
        return unit.names
    if unit.kind is UnitKind.LIST:
        return (Unit(0, UnitKind.LIST, (name, member or "")) for name, member in unit.items)
    return (unit,)


def _survey(name: UnitKind, kind: Kind, headers: HeaderReader, seconds: float) -> Survey:
    units = list(_units(name, kind.kept))
    looked = _look(name, units, headers, max(1, HEADERS // len(kind.kept)), seconds)
    clusters = [cluster for _, clusters in looked for cluster in clusters]
    all_looked = kind.places == len(kind.kept) and len(looked) == len(units)
    counted = sum(cluster.rows for cluster in clusters)
    planned = sum(_planned_rows(unit) for unit, _ in looked)
    as_planned = kind.rows_known and round(counted) == planned
    rows_known = as_planned or (all_looked and all(c.counted for c in clusters))
    rows = counted if all_looked else counted / planned * kind.rows
    seen = list(_weigh(clusters, rows / counted))
    whole = all_looked and all(len(cluster.seen) == cluster.rows for cluster in clusters)
    pages = any(cluster.pages for cluster in clusters)
    return Survey(kind.units, rows, rows_known, seen, whole, pages)


def _look(
    name: UnitKind, units: list[Unit], headers: HeaderReader, most_rows: int, seconds: float
) -> list[tuple[Unit, list[Cluster]]]:
    """What was seen of the units, or of some of them, but one at least. They are taken in no order,
    so that these stand for all."""
    random.Random(_SEED).shuffle(units)
    until = time.monotonic() + seconds

    def look(unit: Unit) -> list[Cluster] | None:
        in_time = unit is units[0] or time.monotonic() < until
        return headers.look_into(unit, most_rows) if in_time else None

    with ThreadPoolExecutor(_THREADS[name]) as pool:
        found = zip(units, pool.map(look, units), strict=True)
        return [(unit, clusters) for unit, clusters in found if clusters is not None]


def _weigh(clusters: list[Cluster], scale: float) -> Iterator[Seen]:
    for cluster in clusters:
        for what in cluster.seen:
            yield Seen(what, cluster.rows / len(cluster.seen) * scale)


def _units(kind: UnitKind, places: Sequence[Unit | str]) -> Iterator[Unit]:
    """Files become units of a few of them."""
    names = [place for place in places if isinstance(place, str)]
    for i in range(0, len(names), _BATCH.get(kind, 1)):
        yield Unit(0, kind, tuple(names[i : i + _BATCH[kind]]))
    yield from (place for place in places if isinstance(place, Unit))
