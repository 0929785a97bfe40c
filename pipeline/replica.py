"""A replica of the model: one engine, which one thread builds and drives for many callers.

Knows requests and results, neither rows nor Ray.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import zip_longest

from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.engine.rank_host import Hosts
from pipeline.canary import Canary, WrongAnswerError
from pipeline.guard import guard
from pipeline.metrics import ReplicaMetrics
from pipeline.watchdog import Watchdog
from schemas.errors import ConfigError, RowError
from schemas.requests import Request, Result

logger = logging.getLogger(__name__)

START_TRIES = 3
START_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Used:
    """Seconds of a replica. stepping: in steps of its engine. clock: all, from when the model was
    loaded to the last step. ranks: that each of them computed, as far as they have told."""

    stepping: float = 0.0
    clock: float = 0.0
    ranks: tuple[float, ...] = ()

    def since(self, before: "Used") -> "Used":
        ranks = zip_longest(self.ranks, before.ranks, fillvalue=0.0)
        return Used(
            self.stepping - before.stepping,
            self.clock - before.clock,
            tuple(now - then for now, then in ranks),
        )


class Replica:
    """An engine and the one thread that builds and drives it.

    A broken engine cannot answer the rows it holds, so the whole process exits: Ray starts the
    actor again and gives the new one the same batches. (`sys.exit` or raising would fail the job.)
    So does one that hangs: a watchdog and a guard see to it.

    hosts: takes them for the engine's ranks, elsewhere; None where the ranks start here.
    """

    def __init__(
        self,
        config: EngineConfig,
        canary: Canary | None = None,
        hosts: Callable[[], Hosts] | None = None,
        ends: Callable[[str], None] = lambda _: None,
        starts: Callable[[str], None] = lambda _: None,
    ) -> None:
        """ends: is told why, before the process exits. starts: how far the engine is, again and
        again, and at last that it is nothing."""
        self._canary = canary
        self._ends = ends
        self._starts = starts
        self._inbox: queue.SimpleQueue[tuple[Request, Future[Result]]] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Result]] = {}
        self._used = self._taken = Used()
        self._ready_at = 0.0
        self._lock = threading.Lock()
        self._ready: Future[None] = Future()
        guard(config.hang_seconds)
        threading.Thread(target=self._run, args=(config, hosts), name="engine", daemon=True).start()

    def submit(self, request: Request) -> "Future[Result]":
        """The future answer; RowError in it if the engine can never compute the request.

        Waits until the model is loaded, and raises what kept it from being so. Raised here and
        not when the actor is made, it ends the run once; Ray would make the actor again and again.
        """
        self._ready.result()
        answer: Future[Result] = Future()
        self._inbox.put((request, answer))
        return answer

    def take_used(self) -> Used:
        """Since the last call of this; at first, since the model was loaded."""
        with self._lock:
            before, self._taken = self._taken, self._used
        return self._taken.since(before)

    def _run(self, config: EngineConfig, hosts: Callable[[], Hosts] | None) -> None:
        try:
            engine = start_engine(config, hosts, self._canary, self._starts)
            metrics = ReplicaMetrics(engine)
            watchdog = Watchdog(engine, config.hang_seconds, self._ends)
        except Exception as error:
            self._ready.set_exception(error)
            return
        self._taken, self._ready_at = Used(ranks=engine.rank_busy_seconds), time.monotonic()
        self._ready.set_result(None)
        self._starts("")
        try:
            while True:
                self._add_waiting(engine)
                with watchdog:
                    seconds = self._step(engine)
                metrics.look(seconds, self._inbox.qsize())
        except BaseException as error:
            logger.exception("the engine broke; this replica is started again")
            self._ends(str(error) or type(error).__name__)
            os._exit(1)

    def _add_waiting(self, engine: Engine) -> None:
        """Moves requests to the engine; waits for one when the engine has nothing to do. None
        while the canary is in doubt: it is to be alone."""
        if self._canary and self._canary.doubted:
            return
        idle = engine.unfinished == 0
        while idle or not self._inbox.empty():
            request, answer = self._inbox.get()
            idle = False
            try:
                engine.add(request)
            except RowError as error:
                answer.set_exception(error)
                idle = engine.unfinished == 0
            else:
                self._waiting[request.id] = answer

    def _step(self, engine: Engine) -> float:
        """The seconds it took."""
        if self._canary:
            _ask(self._canary, engine)
        started = time.perf_counter()
        results = engine.step()
        seconds = time.perf_counter() - started
        with self._lock:
            self._used = Used(
                self._used.stepping + seconds,
                time.monotonic() - self._ready_at,
                engine.rank_busy_seconds,
            )
        for result in results:
            if not (self._canary and self._canary.take(result)):
                self._waiting.pop(result.id).set_result(result)
        return seconds


def _ask(canary: Canary, engine: Engine) -> None:
    if canary.doubted:
        if not engine.unfinished:
            canary.check(engine)
    elif canary.due:
        for request in canary.requests():
            engine.add(request)


def start_engine(
    config: EngineConfig,
    hosts: Callable[[], Hosts] | None = None,
    canary: Canary | None = None,
    at: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Checked by the canary. at: as of an Engine. Raises what Engine and the check do, after a few
    tries: GPUs that a killed replica held are free only some seconds later."""
    for _ in range(START_TRIES - 1):
        try:
            return _checked(Engine(config, hosts and hosts(), at), canary, at)
        except (ConfigError, WrongAnswerError):
            raise
        except Exception:
            logger.exception("the engine did not start; trying again")
            time.sleep(START_WAIT_SECONDS)
    return _checked(Engine(config, hosts and hosts(), at), canary, at)


def _checked(engine: Engine, canary: Canary | None, at: Callable[[str], None]) -> Engine:
    if canary:
        at("the model is loaded, answering two images to check it")
        try:
            canary.check(engine)
        except BaseException:
            engine.close()
            raise
    return engine
