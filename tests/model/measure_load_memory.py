"""Time and memory of `vl01 quantize` and of loads, against `cat` of the same files. Run by hand:

    python -m tests.model.measure_load_memory [--layers 2 --experts 4 --ranks 2 --folder DIR]
    python -m tests.model.measure_load_memory --experts 32 --ranks 1 --device cuda --folder DIR

Writes a random bf16 checkpoint of the released width, makes an int8 one of it, and loads both, each
step in a fresh process and with the files dropped from the page cache. Memory is the host's peak
above that of the interpreter with torch imported and the device in use. Exits 1 if a rank took more
than its weights on the host + the largest tensor + 300 MB, or quantize more than the largest tensor
+ 300 MB, or if the two loads did not give the same weights, bit for bit.
"""

import argparse
import ctypes
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

ALLOWANCE = 300_000_000
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_CORES = len(os.sched_getaffinity(0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--ranks", type=int, default=2, help="1 loads the whole alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the loads")
    parser.add_argument("--folder", help="where the temporary checkpoints go")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(STEPS[given.step[0]](*given.step[1:])))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        return int(not _measure(Path(folder), given))


def _measure(folder: Path, given: argparse.Namespace) -> bool:
    """Whether all was as it must be."""
    plain, int8 = folder / "bf16", folder / "int8"
    written = _run("write", plain, given.layers, given.experts, given.vocab_size)
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True)
    print(
        f"wrote {_size(plain) / 1e9:.2f} GB in {written['seconds']:.1f} s to {kind.stdout.strip()}"
    )
    cat = _time_cat(plain)
    sound = _report("quantize", plain, cat, _run("quantize", plain, int8, cold=plain))
    cuts = [given.layers * rank // given.ranks for rank in range(given.ranks + 1)]
    spans = dict.fromkeys([(0, given.layers), *itertools.pairwise(cuts)])
    digests: list[list[int]] = []
    for checkpoint in (plain, int8):
        cat = cat if checkpoint == plain else _time_cat(int8)
        loads = [_run("load", checkpoint, *span, given.device, cold=checkpoint) for span in spans]
        for span, load in zip(spans, loads, strict=True):
            what = f"load {checkpoint.name}, layers {span[0]} to {span[1] - 1}, on {given.device}"
            sound &= _report(what, checkpoint, cat, load)
        digests.append([load["digest"] for load in loads])
    same = digests[0] == digests[1]
    print(f"the two loads gave {'the same' if same else 'OTHER'} weights")
    return sound and same


def _run(step: str, *arguments: object, cold: Path | None = None) -> dict[str, Any]:
    """What a step says, run in a process of its own, with the files of `cold` on disk only."""
    if cold:
        _drop_from_cache(cold)
    command = [sys.executable, "-m", "tests.model.measure_load_memory", "--step", step]
    output = subprocess.run(
        [*command, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output)


def _report(what: str, checkpoint: Path, cat: float, figures: dict[str, Any]) -> bool:
    """Whether the step took no more memory than it may. cat: bytes/s."""
    excess = figures["peak"] - figures["weights"] - figures["largest"]
    pace = figures["read"] / figures["seconds"]
    print(
        f"{what}: {figures['read'] / 1e9:.2f} GB in {figures['seconds']:.1f} s, "
        f"{pace / 1e9:.2f} GB/s, {pace / cat:.2f} of cat's; host peak "
        f"{figures['peak'] / 1e6:.0f} MB, weights there {figures['weights'] / 1e6:.0f} MB, "
        f"largest tensor {figures['largest'] / 1e6:.0f} MB, the rest {excess / 1e6:.0f} MB"
        + (f"; GPU {figures['gpu']}" if figures.get("gpu") else ""),
        flush=True,
    )
    return excess <= ALLOWANCE


def _write(folder: str, layers: str, experts: str, vocab_size: str) -> dict[str, Any]:
    import torch

    from model.nano.random_checkpoint import RELEASED_SIZES, write_random_checkpoint

    torch.set_num_threads(1)  # of each thread that writes
    started = time.monotonic()
    sizes = replace(
        RELEASED_SIZES, layers=int(layers), experts=int(experts), vocab_size=int(vocab_size)
    )
    write_random_checkpoint(folder, shards=max(5, _CORES), threads=_CORES, **vars(sizes))
    _drop_from_cache(Path(folder))  # waits for the disk
    return {"seconds": time.monotonic() - started}


def _load(checkpoint: str, start: str, stop: str, device: str) -> dict[str, Any]:
    import torch

    from model.weights.checkpoint import load_decoder
    from model.weights.names import checkpoint_tensors
    from model.weights.quantization import quantize
    from model.weights.shards import stored_tensors

    on_cuda = device == "cuda"
    span = range(int(start), int(stop))
    quantize(torch.ones(8, 8, dtype=torch.bfloat16, device=device))  # brings the device up
    before, started = _peak_bytes(), time.monotonic()
    decoder = load_decoder(checkpoint, span, dtype=torch.bfloat16, device=device)
    if on_cuda:
        torch.cuda.synchronize()
    seconds, peak = time.monotonic() - started, _peak_bytes() - before
    names = {entry.name for entry in checkpoint_tensors(decoder.config, span)}
    stored = stored_tensors(checkpoint).values()
    own = [t.nbytes for t in stored if re.sub(r"\._(data|scale)$", "", t.name) in names]
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    most = torch.cuda.max_memory_allocated() if on_cuda else 0
    return {
        "peak": peak,
        "weights": 0 if on_cuda else weights,
        "gpu": f"holds {weights / 1e9:.2f} GB, at most {most / 1e9:.2f}" if on_cuda else "",
        "largest": max(own),
        "read": sum(own),
        "seconds": seconds,
        "digest": _digest(decoder),
    }


def _digest(decoder: "nn.Module") -> int:
    """Of all bytes of all weights."""
    import torch

    sums = [
        torch.stack([part.sum(dtype=torch.int64) for part in bytes.split(1 << 22)]).tolist()
        for parameter in decoder.parameters()
        for bytes in [parameter.detach().flatten().view(torch.uint8)]
    ]
    return zlib.crc32(json.dumps(sums).encode())


def _quantize(source: str, target: str) -> dict[str, Any]:
    import torch  # noqa: F401  (its memory does not count)

    from model.files import Folder
    from model.weights.convert import Quantizer
    from model.weights.shards import stored_tensors

    before, started = _peak_bytes(), time.monotonic()
    done = Quantizer(Folder(source), Folder(target)).run(min(16, _CORES))  # as `vl01 quantize`
    seconds, peak = time.monotonic() - started, _peak_bytes() - before
    largest = max(tensor.nbytes for tensor in stored_tensors(source).values())
    return {
        "peak": peak,
        "weights": 0,
        "largest": largest,
        "read": done.bytes_read,
        "seconds": seconds,
    }


STEPS = {"write": _write, "load": _load, "quantize": _quantize}


def _time_cat(folder: Path) -> float:
    """bytes/s."""
    _drop_from_cache(folder)
    started = time.monotonic()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, _shards(folder))], stdout=nowhere, check=True)
    seconds, size = time.monotonic() - started, _size(folder)
    print(
        f"cat {folder.name}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e9:.2f} "
        "GB/s",
        flush=True,
    )
    return size / seconds


def _drop_from_cache(folder: Path) -> None:
    left = 0
    for path in _shards(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        left += _cached_bytes(path)
    if left > 0.01 * _size(folder):
        print(f"{left / 1e9:.2f} GB of {folder.name} stay in memory", file=sys.stderr)


def _cached_bytes(path: Path) -> int:
    """Of a file, in the page cache: mincore(2)."""
    mapped = np.memmap(path, mode="r")
    pages = np.zeros(-(-len(mapped) // _PAGE_BYTES), dtype=np.uint8)
    address, length = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped))
    if ctypes.CDLL(None).mincore(address, length, ctypes.c_void_p(pages.ctypes.data)):
        return 0
    return int((pages & 1).sum()) * _PAGE_BYTES


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _shards(folder))


def _peak_bytes() -> int:
    """Linux's own count of the most that this process ever held at once."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
