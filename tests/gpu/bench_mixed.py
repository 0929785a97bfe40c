"""Does the engine stay as it is while it works? Minutes of mixed lengths, the engine kept full.

`python -m tests.gpu.bench_mixed --seconds 500 --json FILE`: a slice of the full width with random
weights, fed with requests of all lengths and kinds. Each must be answered once and as it asked, no
memory be lost, and the speed stay. `--seconds` are those of feeding and of answering the last ones;
loading comes before. Exits 1, and says why, when anything is not as it must be.

`--width tiny --device cpu --prompt 1 300 --new 1 40 --seconds 20 --window 1` tries it anywhere.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.bench.slice import WIDTHS
from model.config import VL01Config, load_config
from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.nano.random_checkpoint import write_configuration
from schemas.errors import VL01Error
from tests.gpu.mixed_load import Load, Trend, gpu_bytes
from tests.gpu.mixed_requests import Books, Lengths, Stream
from tests.model.engine.inside import rank_of

PROBES = ("greedy", "greedy", "sampled", "top-p", "in circles", "held") * 3
PROBE_NEW = Lengths(64, 64)
# Of the GPU, idle after against idle before. The graphs of decode steps stay: some megabytes each.
MOST_ALLOCATED = 256 << 20
MOST_DRAIN = 45.0  # seconds


@dataclass(frozen=True)
class Outcome:
    """numbers: for programs. wrong: a sentence for each thing that is."""

    numbers: dict[str, Any]
    wrong: list[str]


def measure(engine: Engine, model: VL01Config, given: argparse.Namespace) -> Outcome:
    prompt = Lengths(*given.prompt)

    def probes() -> Stream:
        return Stream(model, prompt, PROBE_NEW, given.seed + 1, images=0.8)

    first = probe(engine, probes())
    idle, _ = gpu_bytes()
    print(f"{engine.capacity}; {len(first)} requests answered alone", flush=True)
    stream = Stream(model, prompt, Lengths(*given.new), given.seed)
    drain = min(MOST_DRAIN, 0.15 * given.seconds)
    load = Load(engine, model, stream, feed=given.seconds - drain, drain=drain, window=given.window)
    load.run()
    wrong = [*complaints(load.books), *left_over(engine)]
    if engine._chunk_tokens < given.chunk_tokens:
        wrong.append(f"out of memory: went on in microbatches of {engine._chunk_tokens} tokens")
    if not engine.unfinished:
        again = probe(engine, probes())
        changed = [id for id in first if first[id] != again.get(id)]
        wrong += [f"{id} got other tokens at the end than at the beginning" for id in changed]
    grown = gpu_bytes()[0] - idle
    if grown > MOST_ALLOCATED:
        wrong.append(f"{grown / 2**20:,.0f} MiB of the GPU were never given back")
    numbers = load.as_json() | {"idle_gpu_growth": grown}
    if len(load.full) < 4:
        return Outcome(numbers, [*wrong, "too short to tell a trend: make --seconds longer"])
    trend = Trend.of(load.full)
    print(trend.line() + f"; {grown / 2**20:+,.1f} MiB of the GPU, idle", flush=True)
    return Outcome(numbers | {"trend": asdict(trend)}, [*wrong, *trend.wrong(given.most_slower)])


def probe(engine: Engine, stream: Stream) -> dict[str, tuple[int, ...]]:
    """The tokens of a few requests alone: the same ones get the same, whatever came between."""
    requests = [stream.next(f"probe {n}", sys.maxsize, kind) for n, kind in enumerate(PROBES)]
    return {result.id: result.token_ids for result in engine.generate(requests)}


def complaints(books: Books) -> list[str]:
    return [*books.wrong, *(f"request {id} was never answered" for id in books.unanswered)]


def left_over(engine: Engine) -> list[str]:
    """What an engine without requests still holds."""
    rank, memory = rank_of(engine), engine._memory
    found = {
        "requests": engine.unfinished,
        "slots": engine.capacity.slots - len(set(memory._slots)),
        "blocks": engine.capacity.blocks - len(set(memory._blocks)),
        "sequences of the scheduler": engine._scheduler.unfinished,
        "sequences saved on the host": len(rank._saved),
        "images' features": len(rank._features),
    }
    return [f"{count} {what} were never given back" for what, count in found.items() if count]


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=500, help="of feeding and answering")
    parser.add_argument("--window", type=float, default=20, help="seconds of each line")
    parser.add_argument("--prompt", type=int, nargs=2, default=(50, 11_000), help="tokens")
    parser.add_argument("--new", type=int, nargs=2, default=(1, 2_000), help="tokens")
    parser.add_argument("--width", choices=list(WIDTHS), default="released")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--chunk-tokens", type=int, default=16384)
    parser.add_argument("--tokens-per-sequence", type=int, default=4096)
    parser.add_argument("--max-sequences", type=int)
    parser.add_argument("--most-slower", type=float, default=0.05, help="share that still passes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args(line)


def engine_config(folder: Path, given: argparse.Namespace) -> EngineConfig:
    """Of a slice whose configuration is written into `folder`."""
    sizes = replace(WIDTHS[given.width], layers=given.layers)
    sizes = replace(sizes, experts=given.experts or sizes.experts)
    if given.width == "tiny":
        sizes = replace(sizes, tile=56)  # images of a few hundred tokens
    token_ids = write_configuration(folder, sizes)
    # A token that is never sampled: texts run to their full length, held or free.
    ends = {"eos_token_id": token_ids.image}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return EngineConfig(
        str(folder),
        device=given.device,
        quantization=given.quantization,
        chunk_tokens=given.chunk_tokens,
        tokens_per_sequence=given.tokens_per_sequence,
        max_sequences=given.max_sequences,
        random_weights=True,
    )


def main(line: list[str] | None = None) -> int:
    given, started = arguments(line), time.monotonic()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("model").setLevel(logging.INFO)
    try:
        with tempfile.TemporaryDirectory(prefix="vl01-mixed-") as folder:
            config = engine_config(Path(folder), given)
            with Engine(config) as engine:
                loaded = time.monotonic() - started
                print(f"{config.rank_device(0)}, loaded in {loaded:.0f} s", flush=True)
                outcome = measure(engine, load_config(folder), given)
    except VL01Error as error:
        print(f"FAILED: {error}")
        return 1
    asked = {name: value for name, value in vars(given).items() if name != "json"}
    told = {"settings": asked, "torch": torch.__version__, "loaded_seconds": loaded}
    if given.json:
        told |= outcome.numbers | {"wrong": outcome.wrong}
        given.json.write_text(json.dumps(told, indent=2))
    for sentence in outcome.wrong[:20]:
        print(f"FAILED: {sentence}")
    print(f"{'as it must be' if not outcome.wrong else f'{len(outcome.wrong)} things are wrong'}; "
          f"{time.monotonic() - started:.0f} s in all")  # fmt: skip
    return int(bool(outcome.wrong))


if __name__ == "__main__":
    sys.exit(main())
