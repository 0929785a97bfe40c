"""A rank process that meets trouble, for tests: `python -m tests.model.engine.troubled_worker FD`.

TROUBLES in its environment is JSON, a list of [starts, rank, method, tokens, nth]: once the rank
has started over so many times, the nth such call of the method with a microbatch of at least
`tokens` raises torch.OutOfMemoryError, after it has changed the rank's memory, but before it has
received anything. None for any number of starts, or for every call.
"""

import json
import os
from collections import Counter
from functools import wraps
from typing import Any

import torch

from model.engine import rank_worker
from model.engine.rank import Rank
from model.engine.rank_loop import RankLoop
from model.engine.transport import Transport

NAME = "tests.model.engine.troubled_worker"

Trouble = tuple[int | None, int, str, int, int | None]


class Troubles:
    def __init__(self, troubles: list[Trouble]) -> None:
        self._troubles = troubles
        self._calls: Counter[int] = Counter()
        self._rank = -1
        self._starts = 0
        for method in ("take_image", "swap", "embed", "forward", "score", "sample"):
            self._disturb(Rank, method, early=False)
        self._disturb(Transport, "receive", early=True)
        self._listen(Rank, "__init__", self._born)
        self._listen(RankLoop, "_forget", self._started_over)

    def _born(self, rank: Rank, config: Any, index: int, device: Any) -> None:
        self._rank = index

    def _started_over(self, loop: RankLoop) -> None:
        self._starts += 1

    def _listen(self, kind: type, method: str, listener: Any) -> None:
        original = getattr(kind, method)

        def listened_to(*arguments: Any) -> Any:
            listener(*arguments)
            return original(*arguments)

        setattr(kind, method, listened_to)

    def _disturb(self, kind: type, method: str, *, early: bool) -> None:
        original = getattr(kind, method)

        @wraps(original)
        def disturbed(*arguments: Any) -> Any:
            if early:
                self._raise(method, arguments)
            result = original(*arguments)
            if not early:
                self._raise(method, arguments)
            return result

        setattr(kind, method, disturbed)

    def _raise(self, method: str, arguments: tuple[Any, ...]) -> None:
        for n, (starts, rank, where, least, nth) in enumerate(self._troubles):
            here = (rank, where) == (self._rank, method) and starts in (None, self._starts)
            if here and _tokens(method, arguments) >= least:
                self._calls[n] += 1
                if nth in (None, self._calls[n]):
                    raise torch.OutOfMemoryError(f"injected in {method}")


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
    raise NotImplementedError(method)


if __name__ == "__main__":
    Troubles(json.loads(os.environ["TROUBLES"]))
    rank_worker.main()
