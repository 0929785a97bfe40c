"""Answers of a replica by image: what was computed once is copied for every image like it.

Identical images have the same prompt and the same seed, so the copy is what would be computed.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

Columns = Mapping[str, Any]

MOST_BYTES = 64 * 1024**2  # of finished answers: some 15,000 pages of text
_ROW_BYTES = 1024  # beside its text


class Copies:
    """Thread-safe. The answers that were asked for last stay, and all that are being computed."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, Future[Columns]] = OrderedDict()
        self._left = most_bytes

    def claim(self, key: str) -> tuple["Future[Columns]", bool]:
        """The answer, and whether the caller is the first to ask: he must `settle` it."""
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key], False
            answer = self._answers[key] = Future()
            return answer, True

    def settle(self, key: str, columns: Columns) -> None:
        """Give the answer to all that wait for it; one without a text is kept for nobody else."""
        with self._lock:
            answer = self._answers[key]
            answer.set_result(columns)
            if columns.get("text") is None:
                del self._answers[key]
            else:
                self._left -= _size(columns)
                self._make_room()

    def give_up(self, key: str, error: BaseException) -> None:
        """Whoever waits for the answer fails as its owner did."""
        with self._lock:
            answer = self._answers.pop(key)
        answer.set_exception(error)

    def _make_room(self) -> None:
        """Forget what was asked for longest ago, but nothing that is still being computed."""
        if self._left >= 0:
            return
        for key, answer in list(self._answers.items()):
            if answer.done():
                self._left += _size(answer.result())
                del self._answers[key]
            if self._left >= 0:
                return


def _size(columns: Columns) -> int:
    """Bytes, roughly: the fields of an extraction are about as long as its text."""
    return _ROW_BYTES + 4 * len(columns["text"])
