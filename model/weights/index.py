"""What the index of a checkpoint says: which shard holds which tensor. Knows neither torch nor what
is in a shard."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from model.files import FileState, Folder
from schemas.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class QuantizeRecord:
    """What `vl01 quantize` writes into the index, under "vl01" in its metadata.

    source_tensors: the digest of the tensors that were quantized, as `revision.py` makes it.
    piece_bytes: PIECE_BYTES of the program that wrote it. digests: of each tensor's pieces.
    """

    source_tensors: str
    piece_bytes: int
    digests: dict[str, list[str]]


@dataclass(frozen=True)
class Index:
    """shards: tensor name to file name. record: where `vl01 quantize` wrote the checkpoint."""

    shards: dict[str, str]
    record: QuantizeRecord | None = None


def stored_index(folder: Folder) -> Index | None:
    """None where SINGLE is the only shard, which needs no index. Raises CheckpointError."""
    try:
        content = folder.read(INDEX)
    except FileNotFoundError:
        if folder.exists(SINGLE):
            return None
        raise CheckpointError(
            f"{folder} has no {INDEX}. Expected the folder of a MiniMax-VL-01 checkpoint."
        ) from None
    try:
        index = json.loads(content)
        record = (index.get("metadata") or {}).get("vl01")
        return Index(dict(index["weight_map"]), QuantizeRecord(**record) if record else None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder.describe(INDEX)} is no index: {error!r}") from error


def files_of_shards(folder: Folder, shards: Iterable[str]) -> dict[str, FileState]:
    """By name, in order. Raises CheckpointError when one is missing."""
    files, shards = folder.files(), sorted(set(shards))
    if missing := [shard for shard in shards if shard not in files]:
        raise CheckpointError(
            f"{folder.describe(missing[0])} is missing, {len(missing)} of {len(shards)} shards in"
            " all; the index lists tensors in them. Copy them there."
        )
    return {shard: files[shard] for shard in shards}


def check_shards(folder: Folder) -> None:
    """That all are there. Raises CheckpointError."""
    if index := stored_index(folder):
        files_of_shards(folder, index.shards.values())
