"""Reads the rows of tensors: byte ranges in parallel, some ahead of who uses them, in few buffers.

Knows nothing of the network, nor where the rows go.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.files import Folder
from model.weights.shards import PIECE_BYTES, StoredTensor
from schemas.errors import CheckpointError

# Ranges read at a time. From a disk few are enough; a request to an object store takes some 50 ms
# before its first byte comes.
_LOCAL_THREADS = 8
_REMOTE_THREADS = 16
_AHEAD = 2  # buffers more than threads, so that none waits for the piece that is being used


@dataclass(frozen=True)
class Piece:
    """The rows of a tensor from `first_row` on, as many as `piece_rows` or as are left."""

    tensor: StoredTensor
    first_row: int

    @property
    def rows(self) -> int:
        rows = self.tensor.shape[0] if self.tensor.shape else 1
        return min(self.tensor.piece_rows, rows - self.first_row)

    @property
    def offset(self) -> int:
        return self.tensor.offset + self.first_row * self.tensor.row_bytes

    @property
    def nbytes(self) -> int:
        return self.rows * self.tensor.row_bytes

    @property
    def digest(self) -> str | None:
        """What the index says of it."""
        digests = self.tensor.digests
        return digests[self.first_row // self.tensor.piece_rows] if digests else None


def pieces_of(tensor: StoredTensor) -> Iterator[Piece]:
    rows = tensor.shape[0] if tensor.shape else 1
    return (Piece(tensor, row) for row in range(0, rows, tensor.piece_rows))


def short_digest(sha256: Any) -> str:
    """16 hex digits, as the index keeps them."""
    return sha256.hexdigest()[:16]


@dataclass(frozen=True)
class _Read:
    """Pieces that follow each other in a shard, and are read at once."""

    pieces: tuple[Piece, ...]

    @property
    def shard(self) -> str:
        return self.pieces[0].tensor.shard

    @property
    def offset(self) -> int:
        return self.pieces[0].offset

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def _reads(tensors: Iterable[StoredTensor]) -> list[_Read]:
    """In the order of the files, so that each is read from front to back."""
    reads: list[list[Piece]] = []
    end, held = ("", 0), 0  # of the last read: where it stops, and its size
    for tensor in sorted(tensors, key=lambda tensor: (tensor.shard, tensor.offset)):
        for piece in pieces_of(tensor):
            if end == (tensor.shard, piece.offset) and held + piece.nbytes <= PIECE_BYTES:
                reads[-1].append(piece)
            else:
                reads.append([piece])
                held = 0
            held += piece.nbytes
            end = tensor.shard, piece.offset + piece.nbytes
    return [_Read(tuple(pieces)) for pieces in reads]


class ShardReader:
    """Reads from one checkpoint. `bytes_read` counts.

    pinned: into memory that a GPU can fetch. threads: ranges read at a time; None: as many as suit
    the storage.
    """

    def __init__(self, folder: Folder, *, pinned: bool = False, threads: int | None = None) -> None:
        self._folder = folder
        self._pinned = pinned
        self._threads = threads or (_LOCAL_THREADS if folder.is_local else _REMOTE_THREADS)
        self.bytes_read = 0

    def pieces(self, tensors: Iterable[StoredTensor]) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece of the tensors, with its rows, which are valid until the next one is taken.

        Raises CheckpointError when a shard ends early, holds other bytes than the index says or is
        written to meanwhile; EngineError when it cannot be read.
        """
        reads = _reads(tensors)
        before = self._folder.files()
        for read, data in self._in_order(reads):
            start = 0
            for piece in read.pieces:
                yield piece, _rows(data[start : start + piece.nbytes], piece)
                start += piece.nbytes
            self.bytes_read += read.nbytes
        after = self._folder.files()
        for shard in sorted({read.shard for read in reads}):
            if before.get(shard) != after.get(shard):
                raise CheckpointError(
                    f"{self._folder.describe(shard)} was written to while it was read: it was "
                    f"{before.get(shard)} and is {after.get(shard)}. Load again once it is whole."
                )

    def _in_order(self, reads: list[_Read]) -> Iterator[tuple[_Read, Tensor]]:
        """Each read with its bytes, which are valid until the next one is taken."""
        count = min(self._threads + _AHEAD, len(reads))
        largest = max((read.nbytes for read in reads), default=0)
        free = deque(
            torch.empty(largest, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(count)
        )
        waiting: deque[tuple[_Read, Tensor, Future[None]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        try:
            for read in reads:
                if not free:
                    yield (done := _finished(waiting))
                    free.append(done[1])
                buffer = free.popleft()
                waiting.append((read, buffer, pool.submit(self._read, read, buffer)))
            while waiting:
                yield _finished(waiting)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, read: _Read, buffer: Tensor) -> None:
        data = buffer.numpy().data[: read.nbytes]
        self._folder.read_into(read.shard, read.offset, data)
        start = 0
        for piece in read.pieces:
            if piece.digest is not None:
                self._check(piece, data[start : start + piece.nbytes])
            start += piece.nbytes

    def _check(self, piece: Piece, data: memoryview) -> None:
        if (found := short_digest(hashlib.sha256(data))) != piece.digest:
            raise CheckpointError(
                f"{self._folder.describe(piece.tensor.shard)} is damaged or was changed: the "
                f"SHA-256 of {piece.tensor.name} from row {piece.first_row} on begins with "
                f"{found}, the index says {piece.digest}. Copy it again."
            )


def _finished(waiting: deque[tuple[_Read, Tensor, Future[None]]]) -> tuple[_Read, Tensor]:
    read, buffer, future = waiting.popleft()
    future.result()
    return read, buffer


def _rows(data: Tensor, piece: Piece) -> Tensor:
    tensor = piece.tensor
    if data.storage_offset() % tensor.dtype.itemsize:  # follows an odd number of bytes
        data = data.clone()
    return data.view(tensor.dtype).view(piece.rows, *tensor.shape[1:])
