"""Time and memory of `vl01 quantize` and of loads, against `cat` of the same files. Run by hand:

    python -m tests.model.measure_load_memory [--layers 2 --experts 4 --ranks 2 --folder DIR]

Writes a random bf16 checkpoint of the released width, makes an int8 one of it, and loads both, each
step in a fresh process and with the files dropped from the page cache. Memory is the peak above
that of the interpreter with torch imported. Exits 1 if a rank took more than its weights + the
largest tensor + 300 MB, or quantize more than the largest tensor + 300 MB.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ALLOWANCE = 300_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help="where the temporary checkpoints go")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(STEPS[given.step[0]](*given.step[1:])))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        plain, int8 = Path(folder, "bf16"), Path(folder, "int8")
        _write(plain, given)
        excess = [_report("quantize", plain, plain, int8)]
        cuts = [given.layers * rank // given.ranks for rank in range(given.ranks + 1)]
        for checkpoint in (plain, int8):
            _time_cat(checkpoint)
            for start, stop in [(0, given.layers), *itertools.pairwise(cuts)]:
                excess.append(_report("load", checkpoint, checkpoint, start, stop))
        return int(max(excess) > ALLOWANCE)


def _write(folder: Path, given: argparse.Namespace) -> None:
    from model.nano.random_checkpoint import RELEASED_SIZES, write_random_checkpoint

    started = time.monotonic()
    sizes = replace(
        RELEASED_SIZES,
        **{name: getattr(given, name) for name in ("layers", "experts", "vocab_size")},
    )
    write_random_checkpoint(folder, **vars(sizes))
    print(f"wrote {_size(folder) / 1e9:.2f} GB in {time.monotonic() - started:.0f} s", flush=True)


def _report(step: str, cold: Path, *arguments: object) -> int:
    """Runs a step with the files of `cold` on disk only; returns its peak memory beside what it
    must hold, in bytes."""
    _drop_from_cache(cold)
    command = [sys.executable, "-m", "tests.model.measure_load_memory", "--step", step]
    output = subprocess.run(
        [*command, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout
    figures = json.loads(output)
    excess = figures["peak"] - figures["weights"] - figures["largest"]
    gigabytes = figures["read"] / 1e9
    print(
        f"{step} {cold.name} {arguments[1:] if step == 'load' else ''}: {gigabytes:.2f} GB in "
        f"{figures['seconds']:.1f} s, {gigabytes / figures['seconds']:.2f} GB/s; peak "
        f"{figures['peak'] / 1e6:.0f} MB, weights {figures['weights'] / 1e6:.0f} MB, "
        f"largest tensor {figures['largest'] / 1e6:.0f} MB, the rest {excess / 1e6:.0f} MB",
        flush=True,
    )
    return excess


def _load(checkpoint: str, start: str, stop: str) -> dict[str, float]:
    import torch

    from model.weights.checkpoint import load_decoder
    from model.weights.names import checkpoint_tensors
    from model.weights.shards import stored_tensors

    before, started, span = _peak_bytes(), time.monotonic(), range(int(start), int(stop))
    decoder = load_decoder(checkpoint, span, dtype=torch.bfloat16, device="cpu")
    seconds = time.monotonic() - started
    names = {entry.name for entry in checkpoint_tensors(decoder.config, span)}
    stored = stored_tensors(checkpoint).values()
    own = [t.nbytes for t in stored if re.sub(r"\._(data|scale)$", "", t.name) in names]
    return {
        "peak": _peak_bytes() - before,
        "weights": sum(parameter.nbytes for parameter in decoder.parameters()),
        "largest": max(own),
        "read": sum(own),
        "seconds": seconds,
    }


def _quantize(source: str, target: str) -> dict[str, float]:
    import torch  # noqa: F401  (its memory does not count)

    from model.files import Folder
    from model.weights.convert import Quantizer
    from model.weights.shards import stored_tensors

    before, started = _peak_bytes(), time.monotonic()
    done = Quantizer(Folder(source), Folder(target)).run(len(os.sched_getaffinity(0)))
    seconds, peak = time.monotonic() - started, _peak_bytes() - before
    largest = max(tensor.nbytes for tensor in stored_tensors(source).values())
    return {
        "peak": peak,
        "weights": 0,
        "largest": largest,
        "read": done.bytes_read,
        "seconds": seconds,
    }


STEPS = {"load": _load, "quantize": _quantize}


def _time_cat(folder: Path) -> None:
    _drop_from_cache(folder)
    started = time.monotonic()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, _shards(folder))], stdout=nowhere, check=True)
    seconds, size = time.monotonic() - started, _size(folder) / 1e9
    print(f"cat {folder.name}: {size:.2f} GB in {seconds:.1f} s, {size / seconds:.2f} GB/s")


def _drop_from_cache(folder: Path) -> None:
    for path in _shards(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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
