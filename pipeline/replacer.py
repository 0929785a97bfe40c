"""Puts rows that were done again in the place of the old ones, a unit at a time, and counts them.

Decides which of two outcomes of a row stays. Which rows are done again is for retry.py.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.commit import Committer
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.plan import row_id, units_of
from schemas.ladder import is_empty, merit
from schemas.ledger import Unit, Work
from schemas.rows import OUTPUT, Status


@dataclass(frozen=True)
class RetrySummary:
    """The rows that a retry did again, and what became of them.

    again: rows that were done again; added: rows that were not known before, where one stood for
    all that could not be read of a file. rows, reasons: of both together, as they are now.
    """

    output: str
    units: int  # that hold such rows
    planned_units: int  # in all
    unfinished_units: int = 0  # of those, which the run is yet to do
    again: int = 0
    added: int = 0
    rows: dict[str, int] = field(default_factory=dict)  # by status
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Replacer(Committer):
    """Merges the rows of a retry into the parts of their units, and counts what became of them."""

    def __init__(
        self,
        ledger: Ledger,
        lease: Lease,
        units: pa.Table,
        changed: Mapping[str, float] | None = None,
    ) -> None:
        """units: those that are done again, in the RETRY_PLAN schema. changed: the keys of the job
        that are others now; each row that is answered so says it in its message."""
        super().__init__(ledger, lease)
        values = ", ".join(f"{key} {value:g}" for key, value in (changed or {}).items())
        self._note = f"asked again with {values}" if values else ""
        self._units = {unit.number: unit for unit in units_of(units)}
        committed = ledger.committed()
        self._unfinished = int((~committed).sum())
        self._done = np.ones_like(committed)
        self._done[list(self._units)] = False
        self._again = self._added = 0
        self._rows: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    @property
    def left(self) -> int:
        return int((~self._done).sum())

    def summary(self, seconds: float) -> RetrySummary:
        return RetrySummary(
            output=self.ledger.output,
            units=len(self._units),
            planned_units=self.ledger.totals.units,
            unfinished_units=self._unfinished,
            again=self._again,
            added=self._added,
            rows=dict(self._rows),
            reasons=dict(self._reasons),
            seconds=seconds,
        )

    def _is_done(self, unit: int) -> bool:
        return bool(self._done[unit])

    def _commit(self, unit: int, rows: pa.Table) -> Work:
        record, work = self.ledger.record(unit), self._work(rows)
        if self._note:
            rows = with_note(rows, self._note)
        old = self.old_rows(record)
        merged = merge(old, rows, self._units[unit], self.ledger.kept.names)
        if not merged.equals(old):
            self._replace(record, merged, work, record.growth)
        self._count(self._units[unit], old, merged)
        self._done[unit] = True
        return work

    def _count(self, unit: Unit, old: pa.Table, merged: pa.Table) -> None:
        known = set(old["row_id"].to_pylist())
        for row in merged.select(["row_id", "status", "reason"]).to_pylist():
            new = row["row_id"] not in known
            if new or unit.wants(row["row_id"]):
                self._added += new
                self._rows[row["status"]] += 1
                if row["reason"] is not None:
                    self._reasons[row["reason"]] += 1
        self._again += sum(unit.wants(known_id) for known_id in known)


def merge(old: pa.Table, new: pa.Table, unit: Unit, kept: list[str]) -> pa.Table:
    """The part of a unit after a retry. All in the OUTPUT schema with the
    columns carried over from the source, which are named `kept`.

    A row that the unit wants is replaced by the new one unless that is worse, and has the attempts
    of both. Rows that did not come, or were not wanted, stay; so does a value of a kept column that
    its source tells no more, as a damaged file does, or a list with other lines before it.
    Where a row stood for unknown ones, those that came follow the known ones, and it stays only if
    it came again.
    """
    both = pa.concat_tables([old, new])
    judged = both.select(["status", "reason", "text", "output_tokens"]).to_pylist()
    attempts, ids = both["attempts"].to_pylist(), both["row_id"].to_pylist()
    known, came = ids[: old.num_rows], {row: i for i, row in enumerate(ids) if i >= old.num_rows}
    inside = list(zip(new["member"].to_pylist(), new["page"].to_pylist(), strict=True))
    missing = stand_ins(unit) | _opened(unit, inside) if unit.only is None else frozenset()

    takes, olds, tries = [], [], []
    for i, row in enumerate(known):
        if row in missing and unit.wants(row) and row not in came:
            continue
        n = came[row] if row in came and unit.wants(row) else i
        takes.append(i if _is_worse(judged[n], judged[i]) else n)
        olds.append(i)
        tries.append(attempts[i] if n == i else (attempts[i] or 0) + (attempts[n] or 0))
    if missing:
        shut = _vanished(unit, inside, set(known))
        found = sorted(came[row] for row in came.keys() - set(known) - shut)
        takes, olds = takes + found, olds + found
        tries += [attempts[i] for i in found]

    merged = both.take(takes)
    for name in kept:
        told = both[name].is_valid().to_pylist()
        keeps = [new if told[new] else old for new, old in zip(takes, olds, strict=True)]
        merged = merged.set_column(merged.column_names.index(name), name, both[name].take(keeps))
    place = merged.column_names.index("attempts")
    merged = merged.set_column(place, OUTPUT.field("attempts"), pa.array(tries, pa.int32()))
    return merged.cast(both.schema)


def _is_worse(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Of OUTPUT rows: a failure than any answer, an answer as the ladder judges it."""
    if old["status"] == Status.FAILED or new["status"] == Status.FAILED:
        return old["status"] != Status.FAILED
    if is_empty(new["reason"], new["text"] or ""):  # what is done again was not
        return True
    found, had = (merit(row["reason"], row["output_tokens"] or 0) for row in (new, old))
    return found < had


def with_note(rows: pa.Table, note: str) -> pa.Table:
    """OUTPUT rows, of which those that the model answered say so in their message."""
    answered, messages = rows["finish_reason"].to_pylist(), rows["message"].to_pylist()
    noted = [
        "; ".join(filter(None, (message, note))) if finish else message
        for finish, message in zip(answered, messages, strict=True)
    ]
    place = rows.column_names.index("message")
    return rows.set_column(place, OUTPUT.field("message"), pa.array(noted, pa.string()))


def stand_ins(unit: Unit) -> frozenset[str]:
    """The ids of rows that may stand for unknown ones: for what is behind the cut of a tar, for the
    pages of a document that could not be opened."""
    return frozenset(row_id(*item) for item in unit.items if unit.may_hold_documents)


Inside = list[tuple[str | None, int | None]]  # member and page of rows that came


def _opened(unit: Unit, inside: Inside) -> set[str]:
    """The ids of rows that stood for the pages that came of documents in a tar or Parquet file,
    where all of it was read again."""
    return {row_id(unit.names[0], member) for member, page in inside if member and page}


def _vanished(unit: Unit, inside: Inside, known: set[str]) -> set[str]:
    """What may come of documents whose pages are known: they could be opened before."""
    items = [*unit.items, *((unit.names[0], member) for member, _ in inside)]
    return {row_id(*item) for item in items if row_id(*item, 1) in known}
