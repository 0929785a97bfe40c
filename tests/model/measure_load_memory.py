"""Peak memory of loading one rank of a large checkpoint, against what it has to hold.

    python -m tests.model.measure_load_memory [--gigabytes 4.2] [--ranks 2] [--folder DIR]

Writes a random bf16 checkpoint, loads the ranks in fresh processes one after the other, and prints
for each: peak resident memory above the interpreter's with torch imported, the bytes of its own
weights, and the largest tensor. Exits 1 if a rank took more than weights + largest + 300 MB.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALLOWANCE = 300_000_000

# One layer of these holds 0.52 GB in bf16, nearly all of it experts, as in the real one.
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 128,
    "experts": 32,
    "intermediate_size": 2560,
    "vocab_size": 32768,
}
LAYER_GIGABYTES = 0.52


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help="where the temporary checkpoint goes")
    parser.add_argument("--load", nargs=3, metavar=("CHECKPOINT", "START", "STOP"))
    arguments = parser.parse_args()
    if arguments.load:
        checkpoint, start, stop = arguments.load
        print(json.dumps(_measure(checkpoint, range(int(start), int(stop)))))
        return 0
    layers = max(arguments.ranks, math.ceil(arguments.gigabytes / LAYER_GIGABYTES))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        _write(folder, layers)
        cuts = [layers * rank // arguments.ranks for rank in range(arguments.ranks + 1)]
        spans = itertools.pairwise(cuts)
        return max(_report(folder, start, stop) for start, stop in spans)


def _write(folder: str, layers: int) -> None:
    from model.nano.random_checkpoint import write_random_checkpoint

    started, before = time.monotonic(), _peak_bytes()
    write_random_checkpoint(folder, layers=layers, shards=8, **SIZES)
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    print(
        f"wrote {size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s, "
        f"{(_peak_bytes() - before) / 1e6:.0f} MB of memory"
    )


def _report(folder: str, start: int, stop: int) -> int:
    command = [sys.executable, "-m", "tests.model.measure_load_memory", "--load"]
    output = subprocess.run(
        [*command, folder, str(start), str(stop)], check=True, capture_output=True, text=True
    ).stdout
    figures = json.loads(output)
    excess = figures["peak"] - figures["weights"] - figures["largest"]
    megabytes = ", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in figures.items())
    print(
        f"layers {start}..{stop - 1}: {megabytes}; peak - weights - largest {excess / 1e6:.0f} MB"
    )
    return int(excess > ALLOWANCE)


def _measure(checkpoint: str, span: range) -> dict[str, int]:
    import torch

    from model.weights.checkpoint import load_decoder
    from model.weights.names import checkpoint_tensors

    before = _peak_bytes()
    decoder = load_decoder(checkpoint, span, dtype=torch.bfloat16, device="cpu")
    weights = [parameter.nbytes for parameter in decoder.parameters()]
    entries = checkpoint_tensors(decoder.config, span)
    return {
        "peak": _peak_bytes() - before,
        "weights": sum(weights),
        "largest": 2 * max(math.prod(entry.shape) for entry in entries),
    }


def _peak_bytes() -> int:
    """Linux's own count of the most that this process ever held at once."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
