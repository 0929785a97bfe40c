"""The book of canary answers of a run: replicas anywhere in the cluster write and read it.

An actor of the run holds it, and the ledger from one run to the next.
"""

import json
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.canary import Answers
from pipeline.ledger import Ledger

_FILE = "canary.json"
_SECONDS_BETWEEN = 30.0


@ray.remote(num_cpus=0)
class _Pages:
    def __init__(self, answers: dict[str, Answers]) -> None:
        self._answers = answers
        self._complaints: list[str] = []

    def reference(self, kind: str, answers: Answers) -> Answers:
        return self._answers.setdefault(kind, answers)

    def complain(self, message: str) -> None:
        self._complaints.append(message)

    def read(self) -> tuple[dict[str, Answers], list[str]]:
        return self._answers, self._complaints


class SharedBook:
    """What replicas hold of it. Picklable."""

    def __init__(self, pages: Any) -> None:
        self._pages = pages

    def reference(self, kind: str, answers: Answers) -> Answers:
        return ray.get(self._pages.reference.remote(kind, answers))

    def complain(self, message: str) -> None:
        ray.get(self._pages.complain.remote(message))


class CanaryBook:
    """What the run's own process holds of it, once Ray has started."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known = _known(ledger)
        # Beside this process: the loss of another node must not take it along, and the run with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._pages = _Pages.options(scheduling_strategy=here).remote(self._known)
        self._heard = 0
        self._looked = time.monotonic()

    def shared(self) -> SharedBook:
        return SharedBook(self._pages)

    def complaints(self, at_once: bool = False) -> list[str]:
        """Those that were not returned before; looks now and then, or `at_once`. What the book
        holds is kept in the ledger."""
        now = time.monotonic()
        if not at_once and now - self._looked < _SECONDS_BETWEEN:
            return []
        self._looked = now
        answers, complaints = ray.get(self._pages.read.remote())
        if answers != self._known:
            self._known = answers
            self._ledger.write(_FILE, json.dumps(answers, indent=1).encode())
        new, self._heard = complaints[self._heard :], len(complaints)
        return new


def _known(ledger: Ledger) -> dict[str, Answers]:
    try:
        return json.loads(ledger.read(_FILE))
    except FileNotFoundError:
        return {}
