"""What a run tells Prometheus, through the endpoint that Ray serves on every node.

Names and labels are here and nowhere else; jobs/deploy/grafana.json draws them. Ray puts `ray_`
before each name, `_total` after a counter's, and its own labels (node, worker) beside these.
"""

import string
import time
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge

from model.engine.engine import Engine, EngineStatistics
from schemas.ledger import Work

_SECONDS_BETWEEN = 2.0  # two looks at an engine; Prometheus comes by more seldom


class RunMetrics:
    """Of the process that commits. To be made once Ray has started."""

    def __init__(self, output: str) -> None:
        tag = {"output": quote(output, safe=string.printable)}  # Ray takes ASCII only
        self._rows = Counter("vl01_rows", "Committed rows", ("output", "status"))
        self._reasons = Counter("vl01_row_reasons", "Committed rows, by why", ("output", "reason"))
        self._tokens = Counter("vl01_tokens", "Tokens of committed rows", ("output", "kind"))
        self._units_left = Gauge("vl01_units_left", "Units of this run to do", ("output",))
        self._units_begun = Gauge("vl01_units_begun", "Units computed in part", ("output",))
        for metric in (self._rows, self._reasons, self._tokens):
            metric.set_default_tags(tag)
        for metric in (self._units_left, self._units_begun):
            metric.set_default_tags(tag)

    def committed(self, work: Work) -> None:
        for status, count in work.statuses.items():
            self._rows.inc(count, {"status": status})
        for reason, count in work.reasons.items():
            self._reasons.inc(count, {"reason": reason})
        for kind, count in (("prompt", work.prompt_tokens), ("output", work.output_tokens)):
            if count:  # a counter refuses to be raised by nothing
                self._tokens.inc(count, {"kind": kind})

    def units(self, left: int, begun: int) -> None:
        self._units_left.set(left)
        self._units_begun.set(begun)


class ReplicaMetrics:
    """Of the process that holds an engine. `look` after every step; it costs nothing mostly."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._busy = Gauge("vl01_replica_busy_ratio", "Share of time in which the engine computed")
        self._ranks_busy = Gauge(
            "vl01_rank_busy_ratio", "Share of time in which a rank computed", ("rank",)
        )
        self._tokens = Gauge(
            "vl01_replica_tokens_per_second", "Tokens computed, by kind", ("kind",)
        )
        self._sequences = Gauge(
            "vl01_replica_sequences", "Rows in the engine, by state", ("state",)
        )
        self._memory = Gauge(
            "vl01_replica_memory_ratio", "Share of the slots and the K/V blocks in use", ("pool",)
        )
        self._waiting = Gauge("vl01_replica_inbox", "Rows handed over and not yet in the engine")
        self._preemptions = Gauge("vl01_replica_preemptions", "Sequences swapped out so far")
        self._looked = time.monotonic()
        self._busy_seconds = 0.0
        self._counted = EngineStatistics()
        self._rank_seconds: tuple[float, ...] = ()

    def look(self, step_seconds: float, inbox: int) -> None:
        """step_seconds: of the step just done. inbox: rows handed over that wait for it."""
        self._busy_seconds += step_seconds
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN:
            return
        seconds, self._looked = now - self._looked, now
        self._busy.set(min(1.0, self._busy_seconds / seconds))
        self._busy_seconds = 0.0
        self._look_at_ranks(seconds)
        before, self._counted = self._counted, self._engine.statistics
        for kind in ("prompt", "output"):
            count = getattr(self._counted, f"{kind}_tokens") - getattr(before, f"{kind}_tokens")
            self._tokens.set(count / seconds, {"kind": kind})
        use = self._engine.occupancy
        self._sequences.set(use.running, {"state": "running"})
        self._sequences.set(self._engine.unfinished - use.running, {"state": "waiting"})
        self._memory.set(use.slots, {"pool": "slots"})
        self._memory.set(use.blocks, {"pool": "blocks"})
        self._waiting.set(inbox)
        self._preemptions.set(self._counted.preemptions)

    def _look_at_ranks(self, seconds: float) -> None:
        before, self._rank_seconds = self._rank_seconds, self._engine.rank_busy_seconds
        for rank, (then, now) in enumerate(zip(before, self._rank_seconds, strict=False)):
            self._ranks_busy.set(min(1.0, (now - then) / seconds), {"rank": str(rank)})
