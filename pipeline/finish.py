"""GENERATED rows into OUTPUT rows: gives each its status. Knows neither storage nor units."""

import pyarrow as pa

from schemas.errors import Reason
from schemas.requests import FinishReason
from schemas.rows import Status, output_schema

CUT = {FinishReason.LENGTH: Reason.MAX_NEW_TOKENS, FinishReason.REPETITION: Reason.REPETITION}
BROKEN = {Reason.INVALID_JSON, Reason.SCHEMA_MISMATCH}


def finish(rows: pa.Table) -> pa.Table:
    """The same rows, in the same order, in the OUTPUT schema; what an extraction adds and the kept
    columns are carried over."""
    verdicts = [
        _verdict(row["row_id"], row["reason"], row["finish_reason"])
        for row in rows.select(["row_id", "reason", "finish_reason"]).to_pylist()
    ]
    found = {
        **{name: rows[name] for name in rows.column_names},
        "status": pa.array([status.value for status, _ in verdicts], pa.string()),
        "reason": pa.array([reason for _, reason in verdicts], pa.string()),
    }
    schema = output_schema(rows.schema)
    return pa.table([found[name] for name in schema.names], schema)


def _verdict(
    row_id: str, reason: str | None, finish_reason: str | None
) -> tuple[Status, str | None]:
    """Status and reason. A row with neither an answer nor a reason is a bug: ValueError."""
    if finish_reason in CUT:
        return Status.TRUNCATED, CUT[FinishReason(finish_reason)].value
    if finish_reason and reason in BROKEN:
        return Status.INVALID, reason
    if finish_reason:
        return Status.OK, None
    if reason == Reason.BLANK:
        return Status.OK, reason
    if reason:
        return Status.FAILED, reason
    raise ValueError(f"row {row_id} has neither an answer nor a reason why not")
