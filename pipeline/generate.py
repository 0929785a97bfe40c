"""The generate stage: PREPARED rows to GENERATED rows. One actor owns one replica of the model.

Several calls run side by side in one actor, each with its own batch of rows; all feed one engine,
which one thread drives, so that the engine is full across batches.
"""

import hashlib
import logging
import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from model.engine.config import EngineConfig
from model.engine.engine import Engine
from pipeline.finish import CUT
from pipeline.tables import add_columns
from schemas.errors import ConfigError, RowError
from schemas.extraction import Extraction
from schemas.requests import Request, Result, Sampling
from schemas.rows import GENERATED, with_extraction, with_kept

logger = logging.getLogger(__name__)

START_TRIES = 3
START_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class GenerateSettings:
    engine: EngineConfig
    sampling: Sampling
    tile: int
    kept: pa.Schema
    extraction: Extraction | None = None


class Generate:
    """Turns tables of PREPARED rows into tables of GENERATED rows, one row for each, in order.

    The order makes a call repeatable: when Ray runs one again after a failure, its output blocks
    hold the same rows as before.
    """

    def __init__(self, settings: GenerateSettings) -> None:
        self.settings = settings
        asked, schema = settings.extraction, GENERATED
        if asked:
            schema = with_extraction(schema, asked.arrow_type, asked.confidence_type)
        self.schema = with_kept(schema, settings.kept)
        self.replica = Replica(settings.engine)

    def __call__(self, prepared: pa.Table) -> pa.Table:
        rows = prepared.select(["row_id", "width", "height", "reason", "message"]).to_pylist()
        answers = [
            self._ask(row, token_ids, pixels) if row["reason"] is None else None
            for row, token_ids, pixels in zip(
                rows, prepared["token_ids"], prepared["pixels"], strict=True
            )
        ]
        asked = self.settings.extraction
        for row, answer in zip(rows, answers, strict=True):
            row |= {"attempts": 0} if answer is None else _answer_columns(answer, asked)
        seconds = self.replica.take_busy_seconds() / max(1, len(rows))
        for row in rows:
            row["generate_seconds"] = seconds
        return add_columns(prepared, rows, self.schema)

    def _ask(
        self, row: dict[str, Any], token_ids: pa.ListScalar, pixels: pa.LargeListScalar
    ) -> "Future[Result]":
        side = self.settings.tile
        sampling = self.settings.sampling
        request = Request(
            id=row["row_id"],
            token_ids=token_ids.values.to_numpy(),
            tiles=pixels.values.to_numpy().reshape(-1, side, side, 3),  # a view, no copy
            image_size=(row["width"], row["height"]),
            sampling=replace(sampling, seed=row_seed(sampling.seed, row["row_id"])),
        )
        return self.replica.submit(request)


def row_seed(seed: int, row_id: str) -> int:
    """The seed of one row: the same whatever batch, replica or run the row falls into."""
    digest = hashlib.sha256(f"{seed}/{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _answer_columns(answer: "Future[Result]", asked: Extraction | None) -> dict[str, Any]:
    try:
        result = answer.result()
    except RowError as error:
        return {"attempts": 0, "reason": error.reason, "message": error.message}
    columns = {
        "attempts": 1,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "output_tokens": len(result.token_ids),
        "mean_logprob": result.mean_logprob,
    }
    if result.finish_reason in CUT:
        columns["reason"] = CUT[result.finish_reason]
    elif asked:
        columns |= extracted_columns(asked, result)
    return columns


def extracted_columns(asked: Extraction, result: Result) -> dict[str, Any]:
    """What the answer says, and how sure each field is; or how it breaks the schema."""
    try:
        data = asked.parse(result.text)
    except RowError as error:
        return {"reason": error.reason, "message": error.message}
    confidence = asked.confidence(result.text, result.token_logprobs, result.token_ends)
    return {"data": data, "confidence": confidence}


class Replica:
    """An engine and the one thread that builds and drives it.

    A broken engine cannot answer the rows it holds, so the whole process exits: Ray starts the
    actor again and gives the new one the same batches. (`sys.exit` or raising would fail the job.)
    """

    def __init__(self, config: EngineConfig) -> None:
        self._inbox: queue.SimpleQueue[tuple[Request, Future[Result]]] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Result]] = {}
        self._busy_seconds = 0.0
        self._lock = threading.Lock()
        self._ready: Future[None] = Future()
        threading.Thread(target=self._run, args=(config,), name="engine", daemon=True).start()

    def submit(self, request: Request) -> "Future[Result]":
        """The future answer; RowError in it if the engine can never compute the request.

        Waits until the model is loaded, and raises what kept it from being so. Raised here and
        not when the actor is made, it ends the run once; Ray would make the actor again and again.
        """
        self._ready.result()
        answer: Future[Result] = Future()
        self._inbox.put((request, answer))
        return answer

    def take_busy_seconds(self) -> float:
        """Seconds the engine computed since the last call of this."""
        with self._lock:
            seconds, self._busy_seconds = self._busy_seconds, 0.0
        return seconds

    def _run(self, config: EngineConfig) -> None:
        try:
            engine = start_engine(config)
        except Exception as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while True:
                self._add_waiting(engine)
                self._step(engine)
        except BaseException:
            logger.exception("the engine broke; this replica is started again")
            os._exit(1)

    def _add_waiting(self, engine: Engine) -> None:
        """Moves requests to the engine; waits for one when the engine has nothing to do."""
        idle = engine.unfinished == 0
        while idle or not self._inbox.empty():
            request, answer = self._inbox.get()
            idle = False
            if request.id in self._waiting:  # the same row twice: a batch that Ray sent again
                _copy_answer(self._waiting[request.id], answer)
                continue
            try:
                engine.add(request)
            except RowError as error:
                answer.set_exception(error)
                idle = engine.unfinished == 0
            else:
                self._waiting[request.id] = answer

    def _step(self, engine: Engine) -> None:
        started = time.perf_counter()
        results = engine.step()
        with self._lock:
            self._busy_seconds += time.perf_counter() - started
        for result in results:
            self._waiting.pop(result.id).set_result(result)


def start_engine(config: EngineConfig) -> Engine:
    """Raises what Engine does, after a few tries: GPUs that a killed replica held are free only
    some seconds later."""
    for _ in range(START_TRIES - 1):
        try:
            return Engine(config)
        except ConfigError:
            raise
        except Exception:
            logger.exception("the engine did not start; trying again")
            time.sleep(START_WAIT_SECONDS)
    return Engine(config)


def _copy_answer(source: "Future[Result]", target: "Future[Result]") -> None:
    source.add_done_callback(lambda done: target.set_result(done.result()))
