"""The files of a checkpoint: where each tensor lies, and its rows read into one buffer.

Reads safetensors directly (https://github.com/huggingface/safetensors#format): a mapped file
would count as memory, and its tensors are not aligned. Knows nothing of the network.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `offset` is in bytes from the start of the file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def stored_tensors(checkpoint: str | Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, from its index and the headers of its shards.

    Raises CheckpointError when a file is missing, damaged or shorter than its header says, and
    when index and headers disagree or two shards hold the same tensor.
    """
    root = Path(checkpoint)
    shards = _shard_names(root)
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards.values())):
        for tensor in _read_header(root / shard):
            if tensor.name in found:
                raise CheckpointError(
                    f"{root}: {found[tensor.name].path.name} and {shard} both hold {tensor.name}."
                )
            found[tensor.name] = tensor
    for name, shard in shards.items():
        if name not in found or found[name].path.name != shard:
            raise CheckpointError(
                f"{root / INDEX} puts {name} into {shard}, which does not hold it."
            )
    return found


class ShardReader:
    """Reads rows of tensors into one buffer, reused, so that a load needs no more memory."""

    def __init__(self, buffer_bytes: int, *, pinned: bool = False) -> None:
        self._buffer = torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pinned)

    def pieces(self, tensor: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) until all are read. Rows are valid until the next piece is read.

        Raises CheckpointError when the file ends early.
        """
        row_shape = tensor.shape[1:]
        row_bytes = math.prod(row_shape) * tensor.dtype.itemsize
        step = max(1, len(self._buffer) // row_bytes)
        if step * row_bytes > len(self._buffer):
            raise ValueError(f"a row of {tensor.name} has {row_bytes} bytes, the buffer less")
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            for row in range(0, tensor.shape[0], step):
                rows = min(step, tensor.shape[0] - row)
                piece = self._buffer[: rows * row_bytes]
                _fill(file, piece.numpy().data, tensor)
                yield row, piece.view(tensor.dtype).view(rows, *row_shape)


def _fill(file: Any, target: memoryview, tensor: StoredTensor) -> None:
    filled = 0
    while filled < len(target):  # one read returns at most 2 GiB, and on some disks less
        read = file.readinto(target[filled:])
        if not read:
            raise CheckpointError(f"{tensor.path} ends inside {tensor.name}.")
        filled += read


def _shard_names(root: Path) -> dict[str, str]:
    """Tensor name to file name. A checkpoint of one file needs no index."""
    if not (root / INDEX).exists() and (root / SINGLE).exists():
        return {tensor.name: SINGLE for tensor in _read_header(root / SINGLE)}
    try:
        index = json.loads((root / INDEX).read_text(encoding="utf-8"))
        return dict(index["weight_map"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{root} has no {INDEX}. Expected the folder of a MiniMax-VL-01 checkpoint."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{root / INDEX} cannot be read: {error!r}") from error


def _read_header(path: Path) -> list[StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _HEADER_LIMIT):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
        end = max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the index lists tensors in it.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    if size < end:
        raise CheckpointError(f"{path} has {size} bytes; its header says {end}. Copy it again.")
    return tensors


def _stored(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} takes {end - start} bytes, which its shape {shape} does not")
    return StoredTensor(name, path, dtype, shape, data_start + start)
