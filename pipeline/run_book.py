"""The book of a run: replicas anywhere in the cluster write into it what their canaries answered,
how far they are in starting, and why they end.

An actor of the run holds it, and the ledger the answers from one run to the next.
"""

import json
import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.canary import Answers
from pipeline.ledger import Ledger

_FILE = "canary.json"
_SECONDS_BETWEEN = 30.0
_SECONDS_BETWEEN_STEPS = 2.0
_SECONDS_TO_TELL = 5.0
_SAID_NOTHING = "its process was killed, or its node was lost"


class Pages:
    """What is written in the book. By replica: how far it is in starting, and why it ended, until
    it has begun again."""

    def __init__(self, answers: dict[str, Answers]) -> None:
        self._answers = answers
        self._ended: dict[str, str] = {}
        self._restarts: list[str] = []
        self._starting: dict[str, str] = {}

    def reference(self, kind: str, answers: Answers) -> Answers:
        return self._answers.setdefault(kind, answers)

    def ends(self, replica: str, why: str) -> None:
        self._ended[replica] = why

    def starts(self, replica: str, how_far: str) -> None:
        """how_far: empty once it has started."""
        self._starting[replica] = how_far

    def starting(self) -> str:
        """How far the first of those is that are starting."""
        words = next(filter(None, self._starting.values()), "")
        return words and f"starting: {words}"

    def begins_again(self, replica: str) -> None:
        why = self._ended.pop(replica, _SAID_NOTHING)
        self._restarts.append(f"a replica was started again: {why}")

    def read(self) -> tuple[dict[str, Answers], list[str]]:
        return self._answers, self._restarts


class SharedBook:
    """What replicas hold of it. Picklable."""

    def __init__(self, pages: Any) -> None:
        self._pages = pages
        self._told = 0.0  # when it was told last how far a replica is
        self._doing = ""  # what it did then

    def reference(self, kind: str, answers: Answers) -> Answers:
        return ray.get(self._pages.reference.remote(kind, answers))

    def starts(self, how_far: str) -> None:
        """To be said while the replica starts, as often as it likes; then that it is nothing."""
        now, doing = time.monotonic(), how_far.partition(",")[0]
        if doing != self._doing or now - self._told > _SECONDS_BETWEEN_STEPS:
            self._told, self._doing = now, doing
            replica = ray.get_runtime_context().get_actor_id()
            self._pages.starts.remote(replica, how_far)

    def begins(self) -> None:
        """To be said by the process of a replica, at first."""
        context = ray.get_runtime_context()
        if context.was_current_actor_reconstructed:
            self._pages.begins_again.remote(context.get_actor_id())

    def ends(self, why: str) -> None:
        """To be said by it at last. Raises nothing: it ends anyway."""
        with suppress(Exception):
            replica = ray.get_runtime_context().get_actor_id()
            said = self._pages.ends.remote(replica, " ".join(why.split()))
            ray.get(said, timeout=_SECONDS_TO_TELL)


class RunBook:
    """What the run's own process holds of it, once Ray has started."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known = _known(ledger)
        # Beside this process: the loss of another node must not take it along, and the run with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        pages = ray.remote(num_cpus=0)(Pages)
        self._pages = pages.options(scheduling_strategy=here).remote(self._known)
        self.restarts = 0  # of replicas, as far as was looked
        self._looked = time.monotonic()

    def shared(self) -> SharedBook:
        return SharedBook(self._pages)

    def starting(self) -> str:
        """How far a replica is that is starting; empty where none is."""
        return ray.get(self._pages.starting.remote())

    def news(self, at_once: bool = False) -> list[str]:
        """What became of replicas since the last call; looks now and then, or `at_once`. The
        answers are kept in the ledger."""
        now = time.monotonic()
        if not at_once and now - self._looked < _SECONDS_BETWEEN:
            return []
        self._looked = now
        answers, restarts = ray.get(self._pages.read.remote())
        if answers != self._known:
            self._known = answers
            self._ledger.write(_FILE, json.dumps(answers, indent=1).encode())
        new, self.restarts = restarts[self.restarts :], len(restarts)
        return new


def _known(ledger: Ledger) -> dict[str, Answers]:
    try:
        return json.loads(ledger.read(_FILE))
    except FileNotFoundError:
        return {}
