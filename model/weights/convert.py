"""bf16 checkpoint in, int8 checkpoint out: shards that follow layers, side by side, resumable.

DST/layer-07-1-of-2.safetensors, ...  quanto's names; a rank reads those of its layers
DST/_quantize/                        what is done; gone at the end
DST/model.safetensors.index.json      written last: without it, DST is no checkpoint
"""

import ctypes
import json
import math
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch

from model.files import UNFINISHED, Folder
from model.weights.checkpoint import check_checkpoint
from model.weights.index import INDEX, QuantizeRecord
from model.weights.names import checkpoint_tensors
from model.weights.reader import ShardReader
from model.weights.revision import checkpoint_revision, tensors_digest
from model.weights.shard_writer import Planned, ShardPlan, write_shard
from model.weights.shards import PIECE_BYTES, read_index, stored_tensors
from schemas.errors import CheckpointError, ConfigError, StoppedError, VL01Error

MOST_SHARD_BYTES = 5_000_000_000
_M_MMAP_THRESHOLD = -3  # malloc.h
_RECORDS = "_quantize"
_SOURCE = "source.json"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_LAYER = re.compile(r"^language_model\.model\.layers\.(\d+)\.")

# quanto's own words in transformers; the model card's recipe.
_QUANTIZATION_CONFIG = {
    "quant_method": "quanto",
    "weights": "int8",
    "activations": None,
    "modules_to_not_convert": [
        *("vision_tower", "image_newline", "multi_modal_projector", "lm_head", "embed_tokens"),
        "block_sparse_moe.gate",
    ],
}


@dataclass(frozen=True)
class Quantized:
    """What one call did. bytes_read, bytes_written: of shards; 0 when all was there already."""

    shards: int
    shards_kept: int
    bytes_read: int
    bytes_written: int


class Quantizer:
    """From SRC to DST. Raises ConfigError when SRC cannot be quantized or DST not written to.

    `left`: bytes of SRC still to be read.
    """

    def __init__(self, source: Folder, target: Folder) -> None:
        self._source, self._target = source, target
        self._records = target.inside(_RECORDS)
        self._plans = _plan(source)
        self._revision = checkpoint_revision(source)
        self.is_done = self._check_target()
        self._kept = {} if self.is_done else self._read_records()
        self._pending = [plan for plan in self._plans if plan.name not in self._kept]
        self.left = 0 if self.is_done else sum(plan.source_nbytes for plan in self._pending)
        self._check_space()

    @property
    def nbytes(self) -> int:
        """Of DST's tensors, once it is whole."""
        return sum(plan.nbytes for plan in self._plans)

    def run(self, workers: int, read: Callable[[int], None] = lambda _: None) -> Quantized:
        """Does what is left. `workers` shards at a time; each takes some 100 MB of memory.

        read: called from several threads with the bytes of SRC as they are read.
        Raises StoppedError when DST cannot be written to, EngineError when SRC cannot be read: what
        is done stays, and the next Quantizer goes on.
        """
        if self.is_done:
            return Quantized(len(self._plans), len(self._plans), 0, 0)
        _give_memory_back()
        with _told(self._target):
            self._records.write(_SOURCE, json.dumps({"revision": self._revision}).encode())
            digests = self._kept | self._write_shards(workers, read)
            self._finish(digests)
        written = sum(plan.nbytes for plan in self._pending)
        return Quantized(len(self._plans), len(self._kept), self.left, written)

    def read_back(self, read: Callable[[int], None] = lambda _: None) -> int:
        """Reads all that was written, and returns its bytes. Raises CheckpointError, naming the
        shard and the tensor, where it is not what was written."""
        reader = ShardReader(self._target)
        for piece, _ in reader.pieces(stored_tensors(self._target).values()):
            read(piece.nbytes)
        return reader.bytes_read

    def _check_target(self) -> bool:
        """Whether DST holds the result already."""
        source, target = self._source, self._target
        present = target.files()
        if INDEX in present:
            if read_index(target).record and checkpoint_revision(target) == self._revision:
                return True
            raise ConfigError(f"{target} holds another checkpoint; give an empty folder")
        try:
            begun = json.loads(self._records.read(_SOURCE))["revision"]
        except FileNotFoundError:
            if present:
                raise ConfigError(
                    f"{target} holds other files, such as {min(present)}; give an empty folder"
                ) from None
            return False
        if begun != self._revision:
            raise ConfigError(
                f"{target} holds the beginning of another checkpoint: it was made from revision "
                f"{begun}, {source} is {self._revision}; remove it, or give another folder"
            )
        return False

    def _read_records(self) -> dict[str, dict[str, list[str]]]:
        """The digests of the tensors of each shard that is there in full."""
        present, records = self._target.files(), self._records.files()
        done = {}
        for plan in self._plans:
            if plan.name in present and f"{plan.name}.json" in records:
                record = json.loads(self._records.read(f"{plan.name}.json"))
                if record["size"] == present[plan.name].size:
                    done[plan.name] = record["digests"]
        return done

    def _check_space(self) -> None:
        needed, free = sum(plan.nbytes for plan in self._pending), self._target.free_bytes()
        if not self.is_done and free is not None and free < needed:
            raise ConfigError(
                f"{self._target} needs {needed / 1e9:,.1f} GB more, and its disk has "
                f"{free / 1e9:,.1f} GB free"
            )

    def _write_shards(
        self, workers: int, read: Callable[[int], None]
    ) -> dict[str, dict[str, list[str]]]:
        stopping = threading.Event()

        def read_on(count: int) -> None:
            if stopping.is_set():
                raise StoppedError("stopped")
            read(count)

        def write(plan: ShardPlan) -> dict[str, list[str]]:
            with _told(self._target):
                digests = write_shard(self._source, self._target, plan, read_on)
                record = {"size": self._target.files()[plan.name].size, "digests": digests}
                self._records.write(f"{plan.name}.json", json.dumps(record).encode())
            return digests

        # Each worker computes on one core.
        pool = ThreadPoolExecutor(workers, "shard", torch.set_num_threads, (1,))
        try:
            return dict(
                zip(
                    [plan.name for plan in self._pending],
                    pool.map(write, self._pending),
                    strict=True,
                )
            )
        finally:
            stopping.set()
            pool.shutdown(cancel_futures=True)

    def _finish(self, digests: dict[str, dict[str, list[str]]]) -> None:
        """The other files, then the index."""
        for name in self._source.files():
            if not name.endswith((*_WEIGHT_FILES, ".index.json")) and not name.startswith("."):
                self._target.write(name, self._source.read(name))
        config = json.loads(self._source.read("config.json"))
        config |= {"quantization_config": _QUANTIZATION_CONFIG}
        self._target.write("config.json", json.dumps(config, indent=2).encode())
        by_tensor = {name: of for shard in digests.values() for name, of in shard.items()}
        record = QuantizeRecord(tensors_digest(self._source), PIECE_BYTES, by_tensor)
        index = {
            "metadata": {
                "total_size": self.nbytes,
                "vl01": asdict(record),
            },
            "weight_map": {name: shard for shard, of in digests.items() for name in of},
        }
        self._target.write(INDEX, json.dumps(index).encode())
        for folder in (self._records, self._target):
            for name in folder.files():
                if folder is self._records or name.endswith(UNFINISHED):  # of a run that was killed
                    folder.remove(name)
        if self._target.is_local:
            os.rmdir(self._records.path(""))


def _plan(source: Folder) -> list[ShardPlan]:
    """Shards of about MOST_SHARD_BYTES at most, none of two layers. Raises CheckpointError."""
    config = check_checkpoint(source)
    stored = stored_tensors(source)
    if already := [name for name in stored if name.endswith("._data")]:
        raise CheckpointError(
            f"{source} is quantized already: it holds {len(already):,} int8 tensors, such as "
            f"{already[0]}. Use it as it is."
        )
    groups: dict[str, list[Planned]] = defaultdict(list)
    digits = len(str(config.text.num_layers - 1))
    for entry in checkpoint_tensors(config):
        groups[_group(entry.name, digits)].append(Planned(entry, stored[entry.name]))
    return [plan for name, tensors in groups.items() for plan in _cut(name, tensors)]


def _group(tensor: str, digits: int) -> str:
    if layer := _LAYER.match(tensor):
        return f"layer-{int(layer[1]):0{digits}}"
    return "head" if tensor.startswith("language_model.") and "embed" not in tensor else "inputs"


def _cut(name: str, tensors: list[Planned]) -> list[ShardPlan]:
    """Into shards of about the same size."""
    total = sum(tensor.nbytes for tensor in tensors)
    count = math.ceil(total / MOST_SHARD_BYTES)
    parts: list[list[Planned]] = [[] for _ in range(count)]
    before = 0
    for tensor in tensors:
        parts[min(count - 1, before * count // total)].append(tensor)
        before += tensor.nbytes
    return [
        ShardPlan(
            f"{name}{f'-{i}-of-{count}' if count > 1 else ''}.safetensors",
            tuple(sorted(part, key=lambda t: (t.source.shard, t.source.offset))),
        )
        for i, part in enumerate(parts, 1)
        if part
    ]


def _give_memory_back() -> None:
    """What is freed goes back to the system at once. glibc would keep it, for each thread."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def _told(target: Folder) -> Iterator[None]:
    """What storage raises when DST is written to, as one line."""
    try:
        yield
    except VL01Error:
        raise
    except Exception as error:  # storage clients raise far more than OSError
        raise StoppedError(
            f"cannot write to {target}: {error}. What is done stays; the same command goes on."
        ) from error
