"""The rows of one call of the generate stage: asked, tried again where the answer is poor, settled.

Rows finish in any order; only the thread of the call works here, so that turning a page and
reading JSON never hold up the engine.
"""

import queue
from concurrent.futures import Future
from types import TracebackType

from pipeline.attempts import Attempts
from pipeline.copies import Columns, Copies
from pipeline.replica import Replica
from schemas.errors import RowError
from schemas.requests import Request, Result


class Batch:
    """To be left by `with`: whoever waits for an answer that is not settled then fails too."""

    def __init__(self, replica: Replica, copies: Copies) -> None:
        self._replica = replica
        self._copies = copies
        self._open: dict[str, Attempts] = {}
        self._answered: queue.SimpleQueue[tuple[str, Future[Result]]] = queue.SimpleQueue()

    def ask(self, key: str, attempts: Attempts) -> Future[Columns]:
        """The columns of the row's answer, once `work` or another batch has found them.

        key: rows that share it share the answer, and one of them is computed.
        """
        answer, first = self._copies.claim(key)
        if first:
            self._open[key] = attempts
            self._submit(key, attempts.first)
        return answer

    def work(self) -> None:
        """Until all that this batch was the first to ask for is settled."""
        while self._open:
            key, answer = self._answered.get()
            attempts = self._open[key]
            try:
                again = attempts.next(answer.result())
            except RowError as error:
                again = attempts.refused(error)
            if again:
                self._submit(key, again)
            else:
                self._copies.settle(key, attempts.columns())
                del self._open[key]

    def _submit(self, key: str, request: Request) -> None:
        answer = self._replica.submit(request)
        answer.add_done_callback(lambda done: self._answered.put((key, done)))

    def __enter__(self) -> "Batch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for key in self._open:
            self._copies.give_up(key, error or RuntimeError("the batch was left early"))
