"""Which checkpoint it is: a short hash of its configuration, its tokenizer and its tensors."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from model.config import CONFIG_FILES, TOKENIZER_FILES
from model.files import Checkpoint, Folder
from model.weights.shards import StoredTensor, read_index, stored_tensors

_SAMPLED_BYTES = 4096  # of each tensor
_THREADS = 32


def checkpoint_revision(checkpoint: Checkpoint, *, tensors: bool = True) -> str:
    """12 hex digits that change with the configuration, the tokenizer, the tensors or their values.

    They do not change with the place of the checkpoint, nor with how its tensors are spread over
    shards. A checkpoint that `vl01 quantize` wrote has the revision of its source: run in int8,
    both compute the same, bit for bit. Raises CheckpointError as `stored_tensors` does.

    tensors: False for a run with random weights, where there may be none.
    """
    folder = Folder.at(checkpoint)
    digest = hashlib.sha256()
    present = folder.files()
    for name in (*CONFIG_FILES, *TOKENIZER_FILES):
        if name in present:
            content = folder.read(name)
            if name == "config.json":
                content = _without_quantization(content)
            digest.update(f"{name} {len(content)}\n".encode() + content)
    if tensors:
        record = read_index(folder).record
        digest.update((record.source_tensors if record else tensors_digest(folder)).encode())
    return digest.hexdigest()[:12]


def tensors_digest(folder: Folder) -> str:
    """Of all tensors. Some bytes in the middle of each are read, which is enough to tell a
    fine-tuned or otherwise rewritten checkpoint apart."""
    tensors = sorted(stored_tensors(folder).values(), key=lambda tensor: tensor.name)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        samples = pool.map(lambda tensor: _sample(folder, tensor), tensors)
        for tensor, sample in zip(tensors, samples, strict=True):
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode() + sample)
    return digest.hexdigest()


def _sample(folder: Folder, tensor: StoredTensor) -> bytes:
    sample = bytearray(min(tensor.nbytes, _SAMPLED_BYTES))
    start = (tensor.nbytes - len(sample)) // 2
    folder.read_into(tensor.shard, tensor.offset + start, memoryview(sample))
    return bytes(sample)


def _without_quantization(config: bytes) -> bytes:
    values = json.loads(config)
    values.pop("quantization_config", None)
    return json.dumps(values, sort_keys=True).encode()
