"""The generate stage: PREPARED rows to GENERATED rows. One actor owns one replica of the model.

Several calls run side by side in one actor, each with its own batch of rows; all feed one engine,
so that it is full across batches. A row that is tried again holds up its own batch alone.
"""

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from model.engine.config import EngineConfig
from pipeline.attempts import Attempts, Climb
from pipeline.batch import Batch
from pipeline.canary import Canary, CanarySettings
from pipeline.copies import Columns, Copies
from pipeline.finish import CUT
from pipeline.rank_hosts import RankHosts
from pipeline.replica import Replica
from pipeline.run_book import SharedBook
from pipeline.tables import add_columns
from schemas.errors import Reason, RowError
from schemas.extraction import Extraction
from schemas.requests import Request, Result, Sampling
from schemas.rows import generated_schema

# Of the prepared image; written anew for a page that was turned.
_AS_TILED = ("width", "height", "tiles", "image_tokens")


@dataclass(frozen=True)
class GenerateSettings:
    """dedupe: identical images are computed once; so they are seeded by the image, not the row.
    canary: what the replica is checked by; book: with what, and where it says why it ends.
    hosts: of the replica's ranks; None where they share the actor's node and its GPUs.
    """

    engine: EngineConfig
    sampling: Sampling
    tile: int
    kept: pa.Schema
    extraction: Extraction | None = None
    climb: Climb = field(default_factory=Climb)
    dedupe: bool = False
    canary: CanarySettings | None = None
    book: SharedBook | None = None
    hosts: RankHosts | None = None


class Generate:
    """Turns tables of PREPARED rows into tables of GENERATED rows, one row for each, in order.

    The order makes a call repeatable: when Ray runs one again after a failure, its output blocks
    hold the same rows as before.
    """

    def __init__(self, settings: GenerateSettings) -> None:
        self.settings = settings
        self.schema = generated_schema(settings.extraction, settings.kept)
        self.replica = _replica(settings)
        self.copies = Copies()

    def __call__(self, prepared: pa.Table) -> pa.Table:
        names = ["row_id", "image_sha256", "reason", "message", *_AS_TILED]
        rows = prepared.select(names).to_pylist()
        with Batch(self.replica, self.copies) as batch:
            answers = [
                batch.ask(self._key(row), self._attempts(row, token_ids, pixels))
                if row["reason"] is None
                else None
                for row, token_ids, pixels in zip(
                    rows, prepared["token_ids"], prepared["pixels"], strict=True
                )
            ]
            batch.work()
        used, share = self.replica.take_used(), 1 / max(1, len(rows))
        for row, answer in zip(rows, answers, strict=True):
            row |= _not_asked(row) if answer is None else _answered(row, answer.result())
            row["generate_seconds"] = used.stepping * share
            row["replica_seconds"] = used.clock * share
            row["rank_seconds"] = [seconds * share for seconds in used.ranks]
        return add_columns(prepared.drop_columns(list(_AS_TILED)), rows, self.schema)

    def _key(self, row: dict[str, Any]) -> str:
        return row["image_sha256"] if self.settings.dedupe else row["row_id"]

    def _attempts(
        self, row: dict[str, Any], token_ids: pa.ListScalar, pixels: pa.LargeListScalar
    ) -> Attempts:
        side, sampling, key = self.settings.tile, self.settings.sampling, self._key(row)
        first = Request(
            id=row["row_id"],
            token_ids=token_ids.values.to_numpy(),
            tiles=pixels.values.to_numpy().reshape(-1, side, side, 3),  # a view, no copy
            image_size=(row["width"], row["height"]),
            sampling=replace(sampling, seed=row_seed(sampling.seed, key)),
        )
        seed = partial(attempt_seed, sampling.seed, key)
        return Attempts(first, self._judge, seed, self.settings.climb)

    def _judge(self, result: Result) -> Columns:
        return answer_columns(result, self.settings.extraction)


def _replica(settings: GenerateSettings) -> Replica:
    if (book := settings.book) is None:
        return Replica(settings.engine, hosts=settings.hosts)
    book.begins()
    canary = settings.canary and Canary(settings.canary, book)
    return Replica(settings.engine, canary, settings.hosts, book.ends, book.starts)


def row_seed(seed: int, key: str) -> int:
    """The seed of one row: the same whatever batch, replica or run the row falls into."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def attempt_seed(seed: int, key: str, attempt: int) -> int:
    """Of an attempt after the first: another draw, as repeatable as the first."""
    return row_seed(seed, f"{key}#{attempt}")


def _not_asked(row: dict[str, Any]) -> Columns:
    return {"attempts": 0, "text": "" if row["reason"] == Reason.BLANK else None}


def _answered(row: dict[str, Any], columns: Columns) -> Columns:
    """The columns of an answer, for a row it was computed for or for one like it."""
    notes = filter(None, (row["message"], columns.get("message")))
    return {
        **columns,
        "message": "; ".join(notes) or None,
        "row_id": row["row_id"],
        "copied": columns["row_id"] != row["row_id"],
    }


def answer_columns(result: Result, asked: Extraction | None) -> Columns:
    """What the model answered, and in `reason` what is wrong with how it ended."""
    columns: dict[str, Any] = {
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


def extracted_columns(asked: Extraction, result: Result) -> Columns:
    """What the answer says, and how sure each field is; or how it breaks the schema."""
    try:
        data = asked.parse(result.text)
    except RowError as error:
        return {"reason": error.reason, "message": error.message}
    confidence = asked.confidence(result.text, result.token_logprobs, result.token_ends)
    return {"data": data, "confidence": confidence}
