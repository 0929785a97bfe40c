"""A rank process that meets trouble, for tests: `python -m tests.model.engine.troubled_worker FD`.

TROUBLES in its environment is JSON, a list of [what, starts, rank, method, tokens, nth]: once the
rank has started over so many times, the nth such call of the method with a microbatch of at least
`tokens` meets it. None for any number of starts, or for every call. What:
memory: torch.OutOfMemoryError, after the rank's memory is changed, before anything is received;
stuck: it never returns, as with a kernel that does not end; slow: it takes SLOW_SECONDS;
lost: it does not happen, as if what was sent never arrived.

With THROUGH_HOST in its environment the rank may share its GPU with others.
"""

import json
import os
import time
from collections import Counter
from functools import wraps
from typing import Any

import torch

from model.engine import rank_worker
from model.engine.rank import Rank
from model.engine.rank_loop import RankLoop
from model.engine.transport import Transport
from tests.model.engine.through_host import link_through_host

NAME = "tests.model.engine.troubled_worker"
SLOW_SECONDS = 15

Trouble = tuple[str, int | None, int, str, int, int | None]


class Troubles:
    def __init__(self, troubles: list[Trouble]) -> None:
        self._troubles = troubles
        self._calls: Counter[int] = Counter()
        self._rank = -1
        self._starts = 0
        for method in ("take_image", "swap", "embed", "forward", "score", "sample"):
            self._disturb(Rank, method)
        for method in ("receive", "send"):
            self._disturb(Transport, method)
        self._listen(Rank, "__init__", self._born)
        self._listen(RankLoop, "_forget", self._started_over)

    def _born(self, rank: Rank, config: Any, index: int, *_: Any) -> None:
        self._rank = index

    def _started_over(self, loop: RankLoop) -> None:
        self._starts += 1

    def _listen(self, kind: type, method: str, listener: Any) -> None:
        original = getattr(kind, method)

        def listened_to(*arguments: Any) -> Any:
            listener(*arguments)
            return original(*arguments)

        setattr(kind, method, listened_to)

    def _disturb(self, kind: type, method: str) -> None:
        original = getattr(kind, method)

        @wraps(original)
        def disturbed(*arguments: Any) -> Any:
            trouble = self._trouble(method, arguments)
            if trouble == "lost":
                return None
            if trouble != "memory" or kind is not Transport:
                result = original(*arguments)
            if trouble == "memory":
                raise torch.OutOfMemoryError(f"injected in {method}")
            if trouble == "stuck":
                time.sleep(3600)
            if trouble == "slow":
                _compute_for(SLOW_SECONDS)
            return result

        setattr(kind, method, disturbed)

    def _trouble(self, method: str, arguments: tuple[Any, ...]) -> str | None:
        for n, (what, starts, rank, where, least, nth) in enumerate(self._troubles):
            here = (rank, where) == (self._rank, method) and starts in (None, self._starts)
            if here and _tokens(method, arguments) >= least:
                self._calls[n] += 1
                if nth in (None, self._calls[n]):
                    return what
        return None


def _compute_for(seconds: float) -> None:
    until = time.monotonic() + seconds
    x = torch.ones(500, 500)
    while time.monotonic() < until:
        x = x @ x / 500


def _tokens(method: str, arguments: tuple[Any, ...]) -> int:
    match method, arguments:
        case "take_image", _:
            return 0
        case "swap", (_, plan):
            return plan.tokens
        case "forward", (_, _, plan):
            return plan.tokens
        case "embed", (_, microbatch):
            return microbatch.plan.tokens
        case "score", (_, _, microbatch):
            return microbatch.plan.tokens
        case "sample", (_, scored, _):
            return scored.microbatch.plan.tokens
        case "receive", (_, tokens, *_):
            return tokens
        case "send", (_, hidden_TD):
            return len(hidden_TD)
    raise NotImplementedError(method)


if __name__ == "__main__":
    if "THROUGH_HOST" in os.environ:
        link_through_host()
    Troubles(json.loads(os.environ["TROUBLES"]))
    rank_worker.main()
