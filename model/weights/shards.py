"""The files of a checkpoint: which tensors they hold and where, as the index says or otherwise.

Reads safetensors directly (https://github.com/huggingface/safetensors#format): a mapped file
would count as memory, and its tensors are not aligned. Knows nothing of the network.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.files import Checkpoint, Folder
from model.weights.index import (
    INDEX,
    SINGLE,
    Index,
    QuantizeRecord,
    files_of_shards,
    stored_index,
)
from schemas.errors import CheckpointError

# Tensors are read, quantized and checked a piece at a time: as many whole rows as this holds. With
# the fp32 copies that quantizing makes, a load needs some 150 MB beside the weights themselves.
PIECE_BYTES = 8 << 20

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_HEADER_GUESS = 1 << 16  # bytes read at first, which mostly is all of it
_HEADER_THREADS = 32


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `offset` is in bytes from the start of the file.

    digests: of its pieces, in order, where the index has them.
    """

    name: str
    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    digests: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def piece_rows(self) -> int:
        return piece_rows(self.row_bytes)


def piece_rows(row_bytes: int) -> int:
    """Rows of a piece, but for the last one of a tensor."""
    return max(1, PIECE_BYTES // row_bytes)


def read_index(folder: Folder) -> Index:
    """A checkpoint of one file needs none. Raises CheckpointError."""
    if index := stored_index(folder):
        return index
    size = folder.files()[SINGLE].size
    return Index({tensor.name: SINGLE for tensor in _read_header(folder, SINGLE, size)})


def stored_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, from its index and the headers of its shards.

    Raises CheckpointError when a file is missing, damaged or of another size than its header says,
    and when index and headers disagree or two shards hold the same tensor.
    """
    folder = Folder.at(checkpoint)
    index = read_index(folder)
    found: dict[str, StoredTensor] = {}
    for tensor in _read_headers(folder, index):
        if tensor.name in found:
            raise CheckpointError(
                f"{folder}: {found[tensor.name].shard} and {tensor.shard} both hold {tensor.name}."
            )
        found[tensor.name] = tensor
    for name, shard in index.shards.items():
        if name not in found or found[name].shard != shard:
            raise CheckpointError(
                f"{folder.describe(INDEX)} puts {name} into {shard}, which does not hold it."
            )
    return found if index.record is None else _with_digests(found, index.record)


def _with_digests(
    tensors: dict[str, StoredTensor], record: QuantizeRecord
) -> dict[str, StoredTensor]:
    if record.piece_bytes != PIECE_BYTES:  # of another version: they cannot be compared
        return tensors
    return {
        name: replace(tensor, digests=tuple(record.digests.get(name, ())))
        for name, tensor in tensors.items()
    }


def _read_headers(folder: Folder, index: Index) -> list[StoredTensor]:
    files = files_of_shards(folder, index.shards.values())
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        tensors = pool.map(lambda shard: _read_header(folder, shard, files[shard].size), files)
        return [tensor for of_shard in tensors for tensor in of_shard]


def _read_header(folder: Folder, shard: str, size: int) -> list[StoredTensor]:
    where = folder.describe(shard)
    try:
        start = _read_bytes(folder, shard, 0, min(size, _HEADER_GUESS))
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(size, _HEADER_LIMIT):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        more = max(0, 8 + length - len(start))
        header = json.loads((start + _read_bytes(folder, shard, len(start), more))[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors = [_stored(shard, name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is no safetensors file: {error}") from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=8 + length)
    if size != end:
        raise CheckpointError(
            f"{where} has {size:,} bytes; its header says {end:,}. Copy it again."
        )
    return tensors


def _read_bytes(folder: Folder, shard: str, offset: int, size: int) -> bytes:
    data = bytearray(size)
    folder.read_into(shard, offset, memoryview(data))
    return bytes(data)


def _stored(shard: str, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is {entry['dtype']}; expected one of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} takes {end - start} bytes, which its shape {shape} does not")
    return StoredTensor(name, shard, dtype, shape, data_start + start)
