"""What it costs to hold answers to a JSON Schema: decode speed with and without, in turns.

`python -m tests.gpu.bench_masks [--width tiny --device cpu]`: tokens/s of sequences that decode
together, over a slice with random weights, and what the host does for it. The vocabulary is made
up, but as large and as varied as the released one: a mask of the random checkpoint's own few words
would cost nothing. Left to themselves random weights fill every string up to its maxLength, where
masks are slowest, all sequences at once: the worst case. So answers are dictated too.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from jobs.bench.slice import WIDTHS
from model.engine import rank
from model.engine.config import EngineConfig
from model.engine.constraint import Constraints
from model.engine.engine import Engine
from model.engine.microbatch import Microbatch
from model.engine.rank import Rank, Scored
from model.engine.rank_in_process import RankInProcess
from model.layers.ragged import to_device
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


def answers(tokenizer: str, sequences: int, tokens: int) -> list[list[int]]:
    """Beginnings of answers that follow SCHEMA, as a model writes them: no string is filled up to
    its maxLength, and each is somewhere else after a few fields."""
    cut = LLTokenizer(tokenizer, slices=[]).greedy_tokenize
    words = _made_up_words(random.Random(1))
    return [_answer(random.Random(n), words, cut, tokens) for n in range(sequences)]


def _answer(
    rng: random.Random, words: Iterator[str], cut: Callable[[str], list[int]], tokens: int
) -> list[int]:
    def text(most: int) -> str:
        return " ".join(next(words).strip() for _ in range(rng.randint(1, most)))

    def money() -> float:
        return rng.randrange(10 ** rng.randint(2, 7)) / 100

    def party() -> dict:
        tax_number = None if rng.random() < 0.5 else f"DE{rng.randrange(10**9)}"
        return {"name": text(4), "address": text(14), "tax_number": tax_number}

    def line() -> dict:
        numbers = {"quantity": money(), "unit_price": money(), "amount": money()}
        return {"description": text(7), **numbers}

    invoices: list[dict] = []
    while True:
        invoice: dict = {"invoice_number": f"INV-{rng.randrange(10**6)}"}
        invoice["invoice_date"] = f"20{rng.randint(10, 26)}-{rng.randint(1, 9):02}-17"
        invoice |= {"seller": party(), "buyer": party(), "currency": "EUR"}
        invoice |= {"lines": [line() for _ in range(rng.randint(1, 8))], "total": money()}
        invoices.append(invoice)
        written = cut(json.dumps(invoices, separators=(",", ":"))[:-1])
        if len(written) >= tokens:
            return written[:tokens]


@contextmanager
def dictated(texts: list[list[int]]) -> Iterator[None]:
    """Everything is computed as ever, but each sequence gets the next token of its text."""
    score, choose = Rank.score, rank.choose
    next_tokens: list[int] = []

    def look(self: Rank, hidden_TD: Tensor, microbatch: Microbatch) -> Scored:
        next_tokens[:] = [
            texts[segment.sequence % len(texts)][segment.context + segment.length - PROMPT]
            for segment in microbatch.plan.sampling_segments
        ]
        return score(self, hidden_TD, microbatch)

    def dictate(logits_NV: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        _, logprobs_N = choose(logits_NV, *arguments)
        return to_device([next_tokens], logits_NV.device)[0].long(), logprobs_N

    with mock.patch.object(Rank, "score", look), mock.patch.object(rank, "choose", dictate):
        yield


@contextmanager
def timed(owner: type, method: str) -> Iterator[list[float]]:
    """Counts the milliseconds that each call takes."""
    milliseconds: list[float] = []
    call: Callable = getattr(owner, method)

    def measured(*arguments: object) -> object:
        started = time.perf_counter()
        result = call(*arguments)
        milliseconds.append((time.perf_counter() - started) * 1e3)
        return result

    with mock.patch.object(owner, method, measured):
        yield milliseconds


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


@dataclass
class Way:
    """One way to decode, and what was measured of it: tokens/s of each run, milliseconds of each
    step."""

    name: str
    sampling: Sampling
    texts: list[list[int]] | None = None  # what is written, whatever is sampled
    rates: list[float] = field(default_factory=list)
    advance: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)

    def run(self, engine: Engine, sequences: int) -> None:
        with (
            dictated(self.texts) if self.texts else nullcontext(),
            timed(Constraints, "advance") as advance,
            timed(Constraints, "masks") as masks,
            timed(RankInProcess, "receive") as waiting,
        ):
            self.rates.append(run(engine, self.sampling, sequences))
        self.advance += advance
        self.masks += masks
        self.waiting += waiting

    def describe(self, free: "Way") -> str:
        return (
            f"{self.name}: {max(self.rates):,.0f} tokens/s, "
            f"cost {1 - max(self.rates) / max(free.rates):.1%}, "
            f"all runs {[round(rate) for rate in self.rates]}; ms of a step: "
            f"waiting for the rank {_quantiles(self.waiting)}, "
            f"advance {_quantiles(self.advance)}, masks {_quantiles(self.masks)}"
        )


def _quantiles(milliseconds: list[float]) -> str:
    if not milliseconds:
        return "none"
    quantiles = np.percentile(milliseconds, [50, 95, 99, 100])
    return f"{np.mean(milliseconds):.1f} (" + ", ".join(f"{q:.1f}" for q in quantiles) + ")"


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
        tokenizer = (Path(name) / "tokenizer.json").read_text()
        texts = answers(tokenizer, given.sequences, given.new)
        config = EngineConfig(name, device=given.device, random_weights=True, ahead=True)
        with Engine(config) as engine:
            for temperature in given.temperature:
                compare(engine, Sampling(given.new, temperature), given.repeat, texts)


def compare(engine: Engine, sampling: Sampling, repeat: int, texts: list[list[int]]) -> None:
    held = replace(sampling, json_schema=SCHEMA)
    free = Way("free", sampling)
    ways = [
        free,
        Way("held, answers as a model writes them", held, texts),
        Way("held, every string filled up, in lockstep", held),
    ]
    for way in ways:
        run(engine, replace(way.sampling, max_new_tokens=16), len(texts))
    for _ in range(repeat):
        for way in ways:
            way.run(engine, len(texts))
    print(
        f"temperature {sampling.temperature:g}, {len(texts)} sequences; times are the mean "
        "(median, 95%, 99%, most)"
    )
    for way in ways:
        print(way.describe(free), flush=True)


if __name__ == "__main__":
    main()
