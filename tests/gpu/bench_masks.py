"""What it costs to hold answers to a JSON Schema: decode speed with and without, in turns.

`python -m tests.gpu.bench_masks [--width tiny --device cpu]`: tokens/s of sequences that decode
together, over a slice with random weights, and what of it the host computed masks for. The
vocabulary is made up, but as large and as varied as the released one: a mask of the random
checkpoint's own few words would cost nothing.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jobs.bench.slice import WIDTHS
from model.engine.config import EngineConfig
from model.engine.constraint import Constraints
from model.engine.engine import Engine
from model.nano.random_checkpoint import write_configuration
from model.nano.tokenizer import BEGIN, END, IMAGE
from schemas.requests import Request, Sampling

# Bounded as `extract` bounds its fields. It does not end within the tokens that are measured.
_TEXT = {"anyOf": [{"type": "string", "maxLength": 80}, {"type": "null"}]}
_DATE = {"type": "string", "pattern": "^[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$"}
_MONEY = {"type": "number", "multipleOf": 0.01, "minimum": -(10**15) + 1, "maximum": 10**15 - 1}


def _object(**fields: dict) -> dict:
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


_LINE = _object(description=_TEXT, quantity=_MONEY, unit_price=_MONEY, amount=_MONEY)
_INVOICE = _object(
    invoice_number=_TEXT,
    invoice_date=_DATE,
    seller=_object(name=_TEXT, address={"type": "string", "maxLength": 400}, tax_number=_TEXT),
    buyer=_object(name=_TEXT, address={"type": "string", "maxLength": 400}, tax_number=_TEXT),
    currency={"type": "string", "pattern": "^[A-Z]{3}$"},
    lines={"type": "array", "items": _LINE, "maxItems": 100},
    total=_MONEY,
)
PROMPT = 64
SCHEMA = json.dumps({"type": "array", "items": _INVOICE, "minItems": 1000})


def _made_up_words(rng: random.Random) -> Iterator[str]:
    """In no language, a fifth of them capitalised, most with a space before."""
    starts = [*"bcdfghklmnprst", "st", "tr", "ch", "sh", "pl", "br"]
    middles, ends = [*"aeiou", "ai", "ea", "ou"], ["", "", "", *"nrstlm", "nd", "st", "ng"]
    while True:
        syllables = (
            rng.choice(starts) + rng.choice(middles) + rng.choice(ends)
            for _ in range(rng.choice([1, 1, 2, 2, 3, 4]))
        )
        word = "".join(syllables)
        word = word.capitalize() if rng.random() < 0.2 else word
        yield f" {word}" if rng.random() < 0.6 else word


def _vocabulary(size: int) -> list[str]:
    """Bytes, numbers of up to three digits, runs of punctuation, Chinese, and words; in the
    letters of a byte-level BPE."""
    rng = random.Random(0)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = [f"{n:0{digits}d}" for digits in (1, 2, 3) for n in range(10**digits)]
    marks = ",.:;!?()[]{}\"'-_/\\"
    texts += ["".join(run) for length in (2, 3) for run in product(marks, repeat=length)]
    texts += [
        "".join(chr(0x4E00 + rng.randrange(5000)) for _ in range(rng.choice([1, 2, 2, 3])))
        for _ in range(20_000)
    ]
    words = _made_up_words(rng)
    while len(pieces) < size:
        text = texts.pop(0) if texts and len(pieces) % 3 else next(words)
        pieces[byte_level.pre_tokenize_str(text)[0][0]] = None
    return list(pieces)


def write_vocabulary(folder: Path, vocab_size: int) -> None:
    """In place of the checkpoint's tokenizer, with the same special tokens."""
    specials = [BEGIN, END, IMAGE]
    pieces = _vocabulary(vocab_size - len(specials))
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    image = tokenizer.token_to_id(IMAGE)
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": image}))
    # A token that is never sampled: texts run to their full length, held or free.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": image}))


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Counts what the host spends on computing masks."""
    masks: Callable = Constraints.masks

    def measured(*arguments: object) -> np.ndarray:
        started = time.perf_counter()
        bits = masks(*arguments)
        seconds.append(time.perf_counter() - started)
        return bits

    with mock.patch.object(Constraints, "masks", measured):
        yield


def run(engine: Engine, sampling: Sampling, sequences: int) -> float:
    """Tokens/s once all prompts are computed: of decoding alone."""
    rng = np.random.default_rng(0)
    prompts = engine.statistics.prompt_tokens
    for n in range(sequences):
        ids = rng.integers(0, 600, PROMPT, dtype=np.int32)
        engine.add(Request(str(n), ids, sampling=replace(sampling, seed=n)))
    while engine.statistics.prompt_tokens < prompts + sequences * PROMPT:
        engine.step()
    started, before = time.perf_counter(), engine.statistics.output_tokens
    results = []
    while engine.unfinished:
        results += engine.step()
    written = engine.statistics.output_tokens - before
    assert {len(result.token_ids) for result in results} == {sampling.max_new_tokens}
    return written / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", choices=list(WIDTHS), default="released")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    given = parser.parse_args()
    sizes = replace(WIDTHS[given.width], layers=8)
    sizes = replace(sizes, vocab_size=given.vocab_size or sizes.vocab_size)
    with tempfile.TemporaryDirectory(prefix="vl01-masks-") as name:
        write_configuration(Path(name), sizes, endless=True)
        write_vocabulary(Path(name), sizes.vocab_size)
        config = EngineConfig(name, device=given.device, random_weights=True, ahead=True)
        with Engine(config) as engine:
            for temperature in given.temperature:
                compare(engine, temperature, given.sequences, given.new, given.repeat)


def compare(engine: Engine, temperature: float, sequences: int, new: int, repeat: int) -> None:
    free = Sampling(max_new_tokens=new, temperature=temperature)
    held = replace(free, json_schema=SCHEMA)
    for sampling in (free, held):
        run(engine, replace(sampling, max_new_tokens=16), sequences)
    rates: dict[str, list[float]] = {"free": [], "held": []}
    seconds: list[float] = []
    for _ in range(repeat):
        rates["free"].append(run(engine, free, sequences))
        with timed(seconds):
            rates["held"].append(run(engine, held, sequences))
    best = {name: max(found) for name, found in rates.items()}
    milliseconds = np.array(seconds) * 1e3
    print(
        f"temperature {temperature:g}, {sequences} sequences: "
        f"free {best['free']:,.0f} tokens/s, held {best['held']:,.0f} tokens/s, "
        f"cost {1 - best['held'] / best['free']:.1%}; "
        f"all runs {json.dumps({k: [round(x) for x in v] for k, v in rates.items()})}; "
        f"masks of a step: median {np.median(milliseconds):.1f} ms, "
        f"99% {np.percentile(milliseconds, 99):.1f} ms, most {milliseconds.max():.1f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
