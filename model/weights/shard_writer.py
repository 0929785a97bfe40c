"""Writes one shard of an int8 checkpoint: its layout known before, its tensors streamed through.

https://github.com/huggingface/safetensors#format. Knows nothing of the other shards.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.files import Folder
from model.weights.names import TensorEntry
from model.weights.quantization import quantize
from model.weights.reader import ShardReader, short_digest
from model.weights.shards import DTYPES, StoredTensor, piece_rows

_READ_THREADS = 2  # of each shard; many shards are written side by side
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor of a shard to be written, and the stored one it is made from."""

    entry: TensorEntry
    source: StoredTensor

    def written(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what it becomes: itself, or quanto's two."""
        name, shape = self.entry.name, self.entry.shape
        if self.entry.quantized:
            yield f"{name}._data", torch.int8, shape
            yield f"{name}._scale", torch.bfloat16, (shape[0], 1)
        else:
            yield name, self.source.dtype, shape

    @property
    def nbytes(self) -> int:
        """When written."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.written())


@dataclass(frozen=True)
class ShardPlan:
    """name: of the file. tensors: in the order of the source's files, in which they are read."""

    name: str
    tensors: tuple[Planned, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def source_nbytes(self) -> int:
        return sum(tensor.source.nbytes for tensor in self.tensors)


def write_shard(
    source: Folder, target: Folder, plan: ShardPlan, read: Callable[[int], None]
) -> dict[str, list[str]]:
    """The digests of every tensor written, as the index keeps them.

    read: called with the bytes of the source as they are used; what it raises ends the writing.
    """
    digests: dict[str, _Digests] = {}
    with target.writing(plan.name) as file:
        file.write(_header(plan.tensors))
        for name, rows in _quantized(source, plan, read):
            data = rows.contiguous().flatten().view(torch.uint8).numpy().data
            file.write(data)
            if name not in digests:
                digests[name] = _Digests(rows[:1].nbytes)
            digests[name].update(data)
    return {name: digest.finish() for name, digest in digests.items()}


def _quantized(
    source: Folder, plan: ShardPlan, read: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    """What is written: names, and rows of them, in order."""
    entries = {tensor.source.name: tensor.entry for tensor in plan.tensors}
    reader, scales = ShardReader(source, threads=_READ_THREADS), []
    for piece, rows in reader.pieces([tensor.source for tensor in plan.tensors]):
        read(piece.nbytes)
        entry = entries[piece.tensor.name]
        if not entry.quantized:
            yield entry.name, rows
            continue
        data, scale = quantize(rows)
        yield f"{entry.name}._data", data
        scales.append(scale)
        if piece.first_row + piece.rows == entry.shape[0]:
            yield f"{entry.name}._scale", torch.cat(scales)
            scales.clear()


def _header(tensors: Iterable[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        for name, dtype, shape in tensor.written():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


class _Digests:
    """Of a tensor's pieces, however it is cut when it is written."""

    def __init__(self, row_bytes: int) -> None:
        self._piece_bytes = piece_rows(row_bytes) * row_bytes
        self._done: list[str] = []
        self._hash, self._held = hashlib.sha256(), 0

    def update(self, data: memoryview) -> None:
        while data:
            part = data[: self._piece_bytes - self._held]
            self._hash.update(part)
            self._held += len(part)
            if self._held == self._piece_bytes:
                self._end_piece()
            data = data[len(part) :]

    def finish(self) -> list[str]:
        if self._held:
            self._end_piece()
        return self._done

    def _end_piece(self) -> None:
        self._done.append(short_digest(self._hash))
        self._hash, self._held = hashlib.sha256(), 0
