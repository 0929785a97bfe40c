"""The Arrow schema of what passes between stages: INPUT, PREPARED, GENERATED, OUTPUT rows.

Columns that a user asked to keep from a Parquet source follow the named ones in each of them.
"""

from enum import StrEnum
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from schemas.extraction import Extraction


class Status(StrEnum):
    """The `status` column: what became of a row."""

    OK = "ok"
    TRUNCATED = "truncated"  # the answer was cut: it reached max_new_tokens, or went in circles
    INVALID = "invalid"  # the model answered, the answer breaks the schema
    FAILED = "failed"  # no answer; `reason` and `message` say why


_IDENTITY = [
    ("row_id", pa.string()),  # stable: made from name of source, member and page
    ("unit", pa.int64()),
    ("index", pa.int32()),  # position within the unit
    ("unit_rows", pa.int32()),  # rows of the unit, on its last row; null before
    ("unit_digest", pa.string()),  # of their ids, likewise
    ("source", pa.string()),
    ("member", pa.string()),  # name within a tar, row number within a Parquet file
    ("page", pa.int32()),  # of a document; null for an image
]
_VERDICT = [("reason", pa.string()), ("message", pa.string())]
_IMAGE = [
    ("image_tokens", pa.int32()),
    ("tiles", pa.int32()),
    ("width", pa.int32()),  # pixels, as tiled (after an EXIF rotation, if one was asked for)
    ("height", pa.int32()),
    ("image_sha256", pa.string()),  # of the encoded bytes
]
_ANSWER = [
    ("text", pa.string()),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("output_tokens", pa.int32()),
    ("attempts", pa.int32()),
    ("mean_logprob", pa.float32()),
]

INPUT = pa.schema(
    [*_IDENTITY, *_VERDICT, ("read_seconds", pa.float32()), ("data", pa.large_binary())]
)

PREPARED = pa.schema(
    [
        *_IDENTITY,
        *_VERDICT,
        ("read_seconds", pa.float32()),
        *_IMAGE,
        ("prepare_seconds", pa.float32()),
        ("token_ids", pa.list_(pa.int32())),
        # uint8 [tiles, side, side, 3], flat. Ragged lists of uint8 cross Ray's object store without
        # a copy; Python bytes cost ten times as much.
        ("pixels", pa.large_list(pa.uint8())),
    ]
)

GENERATED = pa.schema(
    [
        *_IDENTITY,
        *_VERDICT,
        ("read_seconds", pa.float32()),
        *_IMAGE,
        ("prepare_seconds", pa.float32()),
        *_ANSWER,
        ("copied", pa.bool_()),  # from a row with the same image; null if the model was not asked
        # A row's share of what its replica took: of the time in steps of the engine, of all time
        # since it was ready, and of the time in which each rank computed.
        ("generate_seconds", pa.float32()),
        ("replica_seconds", pa.float32()),
        ("rank_seconds", pa.list_(pa.float32())),
    ]
)

OUTPUT = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("member", pa.string()),
        ("page", pa.int32()),
        ("status", pa.string()),
        *_VERDICT,
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("image_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("tiles", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_sha256", pa.string()),
        ("attempts", pa.int32()),
        ("mean_logprob", pa.float32()),
    ]
)


EXTRACTION_NAMES = ("data", "confidence")


def generated_schema(asked: "Extraction | None", kept: pa.Schema) -> pa.Schema:
    """GENERATED, with what an extraction adds, if there is one, and the kept columns."""
    schema = GENERATED
    if asked:
        schema = _with_extraction(schema, asked.arrow_type, asked.confidence_type)
    return with_kept(schema, kept)


def _with_extraction(schema: pa.Schema, data: pa.DataType, confidence: pa.DataType) -> pa.Schema:
    """GENERATED or OUTPUT with what an extraction adds: `data`, the fields that were read, after
    the text; `confidence`, the probability of the least likely token of each, after the row's.
    """
    added = {"text": pa.field("data", data), "mean_logprob": pa.field("confidence", confidence)}
    fields = []
    for field in schema:
        fields += [field, *([added[field.name]] if field.name in added else [])]
    return pa.schema(fields)


def output_schema(generated: pa.Schema) -> pa.Schema:
    """Of rows in a GENERATED schema: OUTPUT with the same extraction and the same kept columns."""
    schema, own = OUTPUT, {*GENERATED.names, *EXTRACTION_NAMES}
    if "data" in generated.names:
        types = (generated.field(name).type for name in EXTRACTION_NAMES)
        schema = _with_extraction(OUTPUT, *types)
    return with_kept(schema, pa.schema([field for field in generated if field.name not in own]))


# Not a stage: what --documents writes of the OUTPUT rows. Offsets count characters of `text`.
DOCUMENTS = pa.schema(
    [
        ("source", pa.string()),
        ("member", pa.string()),  # its address, where the source is a list of them
        ("page_count", pa.int32()),  # null for a plain image and what could not be opened
        ("text", pa.string()),  # of its pages, a blank line between two
        *((status.value, pa.int32()) for status in Status),  # how many of its rows
        (
            "pages",
            pa.list_(
                pa.struct(
                    [
                        ("page", pa.int32()),
                        ("row_id", pa.string()),
                        ("status", pa.string()),
                        ("reason", pa.string()),
                        ("start", pa.int64()),
                        ("end", pa.int64()),
                    ]
                )
            ),
        ),
    ]
)


def with_kept(schema: pa.Schema, kept: pa.Schema) -> pa.Schema:
    """`schema` followed by the columns carried over from the source."""
    return pa.schema([*schema, *kept])
