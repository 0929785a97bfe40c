"""What it costs to hold answers to a JSON Schema: decode speed with and without, in turns.

`python -m tests.gpu.bench_masks [--width tiny --device cpu]`: tokens/s of sequences that decode
together, over a slice with random weights, and where a step's time goes. The vocabulary is made
up, but as large and as varied as the released one: a mask of the random checkpoint's own few words
would cost nothing. Left to themselves random weights fill every string up to its maxLength, where
masks are slowest, all sequences at once: the worst case. So answers as a model writes them are
measured too. Either way every token is dictated, with a schema and without: what the layers take
depends on the tokens, since like tokens choose like experts, of which fewer are read.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from model.engine.busy import BusyClock
from model.engine.config import EngineConfig
from model.engine.constraint import Constraints
from model.engine.engine import Engine
from model.engine.microbatch import Microbatch
from model.engine.rank import Rank, Scored
from model.engine.rank_in_process import RankInProcess
from model.layers.ragged import to_device
from model.nano.random_checkpoint import write_configuration
from model.nano.tokenizer import BEGIN, END, IMAGE
from schemas.requests import Request, Result, Sampling

# Bounded as `extract` bounds its fields. It does not end within the tokens that are measured.
_MOST_TEXT, _MOST_ADDRESS = 80, 400  # characters
_TEXT = {"anyOf": [{"type": "string", "maxLength": _MOST_TEXT}, {"type": "null"}]}
_ADDRESS = {"type": "string", "maxLength": _MOST_ADDRESS}
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
    seller=_object(name=_TEXT, address=_ADDRESS, tax_number=_TEXT),
    buyer=_object(name=_TEXT, address=_ADDRESS, tax_number=_TEXT),
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
    def text(most_words: int, most: int = _MOST_TEXT) -> str:
        return " ".join(next(words).strip() for _ in range(rng.randint(1, most_words)))[:most]

    def money() -> float:
        return rng.randrange(10 ** rng.randint(2, 7)) / 100

    def party() -> dict:
        tax_number = None if rng.random() < 0.5 else f"DE{rng.randrange(10**9)}"
        return {"name": text(4), "address": text(14, _MOST_ADDRESS), "tax_number": tax_number}

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
    """Counts the milliseconds of the host that each call takes."""
    milliseconds: list[float] = []
    call: Callable = getattr(owner, method)

    def measured(*arguments: object) -> object:
        started = time.perf_counter()
        result = call(*arguments)
        milliseconds.append((time.perf_counter() - started) * 1e3)
        return result

    with mock.patch.object(owner, method, measured):
        yield milliseconds


@contextmanager
def timed_on_device(method: str) -> Iterator[list[BusyClock]]:
    """A clock of what the device takes for this method of the rank, once that was called."""
    clocks: list[BusyClock] = []
    call: Callable = getattr(Rank, method)

    def measured(self: Rank, *arguments: object) -> object:
        if not clocks:
            clocks.append(BusyClock(self.device))
        with clocks[0].computing():
            return call(self, *arguments)

    with mock.patch.object(Rank, method, measured):
        yield clocks


@dataclass(frozen=True)
class Decoded:
    """One run, once all prompts were computed. busy: the share of time that the device computes.
    texts: what each sequence wrote."""

    tokens: int
    seconds: float
    busy: float
    texts: list[list[int]]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(engine: Engine, sampling: Sampling, sequences: int) -> Decoded:
    """Sequences that all decode together, from their second token to their last."""
    rng = np.random.default_rng(0)
    before = engine.statistics
    for n in range(sequences):
        ids = rng.integers(0, 600, PROMPT, dtype=np.int32)
        engine.add(Request(str(n), ids, sampling=replace(sampling, seed=n)))
    results = []
    while engine.statistics.prompt_tokens < before.prompt_tokens + sequences * PROMPT:
        results += engine.step()
    running = engine.occupancy.running
    assert running == sequences, f"{running} of {sequences} decode together: {engine.capacity}"
    (busy,), written = engine.rank_busy_seconds, engine.statistics.output_tokens
    started = time.perf_counter()
    while engine.unfinished:
        results += engine.step()
    seconds = time.perf_counter() - started
    _check(engine, results, sampling.max_new_tokens)
    preempted = engine.statistics.preemptions - before.preemptions
    assert not preempted, f"{preempted} of {sequences} sequences made room for others"
    busy = (engine.rank_busy_seconds[0] - busy) / seconds
    texts = [list(result.token_ids) for result in sorted(results, key=lambda r: int(r.id))]
    return Decoded(engine.statistics.output_tokens - written, seconds, busy, texts)


def _check(engine: Engine, results: list[Result], tokens: int) -> None:
    """Did every answer become as long as asked?"""
    short = [result for result in results if len(result.token_ids) != tokens]
    told = [f"{r.id}: {r.finish_reason} at {len(r.token_ids)}, {r.text[-60:]!r}" for r in short]
    assert results, "no answer came back"
    assert not short, f"{len(short)} of {len(results)} answers ended early: {told[:5]}"


_HOST = {
    "submit": (RankInProcess, "submit"),  # launches a step's kernels
    "wait for tokens": (RankInProcess, "receive"),  # the host is ahead of the device
    "record": (Engine, "_record"),  # `advance` included
    "advance": (Constraints, "advance"),
    "masks": (Constraints, "masks"),
    "constrain": (RankInProcess, "constrain"),  # copies masks, launches the choice of tokens
}
_DEVICE = ("forward", "score", "sample")


@dataclass
class Way:
    """One way to decode, and what was measured of it. host: milliseconds of each call in _HOST.
    device: mean milliseconds of a step, of each run, for each of _DEVICE; the prompts count too.
    """

    name: str
    sampling: Sampling
    texts: list[list[int]]  # what is written, whatever is sampled
    runs: list[Decoded] = field(default_factory=list)
    host: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _HOST})
    device: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _DEVICE})

    @property
    def rate(self) -> float:
        """tokens/s of the best run."""
        return max(decoded.rate for decoded in self.runs)

    def run(self, engine: Engine, sequences: int) -> None:
        with ExitStack() as stack:
            stack.enter_context(dictated(self.texts))
            host = {name: stack.enter_context(timed(*call)) for name, call in _HOST.items()}
            device = {name: stack.enter_context(timed_on_device(name)) for name in _DEVICE}
            self.runs.append(run(engine, self.sampling, sequences))
        for name, milliseconds in host.items():
            self.host[name] += milliseconds[1:]  # less the prompts
        for name, (clock,) in device.items():
            self.device[name].append(clock.seconds / clock.finished * 1e3)

    def describe(self, free: "Way") -> str:
        step = [decoded.seconds / self.sampling.max_new_tokens * 1e3 for decoded in self.runs]
        host = [f"{name} {_quantiles(times)}" for name, times in self.host.items()]
        device = [f"{name} {np.mean(times):.2f}" for name, times in self.device.items()]
        busy = np.mean([decoded.busy for decoded in self.runs])
        return (
            f"{self.name}: {self.rate:,.0f} tokens/s, cost {1 - self.rate / free.rate:.1%}, "
            f"all runs {[round(decoded.rate) for decoded in self.runs]}; "
            f"{np.mean(step):.2f} ms a step\n"
            f"  device: {', '.join(device)}; {busy:.1%} busy\n  host: {', '.join(host)}"
        )


def _quantiles(milliseconds: list[float]) -> str:
    if not milliseconds:
        return "none"
    quantiles = np.percentile(milliseconds, [50, 95, 99, 100])
    return f"{np.mean(milliseconds):.2f} (" + ", ".join(f"{q:.1f}" for q in quantiles) + ")"


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
        config = EngineConfig(
            name,
            device=given.device,
            random_weights=True,
            ahead=True,
            max_sequences=given.sequences,
            tokens_per_sequence=PROMPT + given.new,
        )
        with Engine(config) as engine:
            print(f"{engine.capacity}, {config.threads_per_rank} threads for masks", flush=True)
            for temperature in given.temperature:
                compare(engine, Sampling(given.new, temperature), given.repeat, texts)


def compare(engine: Engine, sampling: Sampling, repeat: int, texts: list[list[int]]) -> None:
    held = replace(sampling, json_schema=SCHEMA)
    filled = run(engine, held, len(texts)).texts
    for what, written in (("as a model writes", texts), ("every string filled up", filled)):
        ways = Way(f"free, {what}", sampling, written), Way(f"held, {what}", held, written)
        for _ in range(1 + repeat):  # once more, since the first one compiles and records
            for way in ways:
                way.run(engine, len(texts))
        print(
            f"temperature {sampling.temperature:g}, {len(texts)} sequences; milliseconds are the "
            "mean (median, 95%, 99%, most) of a step"
        )
        for way in ways:
            print(way.describe(ways[0]), flush=True)


if __name__ == "__main__":
    main()
