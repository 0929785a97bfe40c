"""What each of some requests gets alone, slowly: by the rules of Sampling and Result, with the
tokens of the slow twin. Knows no engine."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from model.config import VL01Config
from model.decoder import Decoder
from model.engine.constraint import Constraints
from model.inputs.tiling import choose_layout
from model.tokenizer import Tokenizer
from schemas.requests import FinishReason, Request, Result, Sampling
from tests.model.engine.conftest import written_slowly

MOST_NEW = 48  # tokens of an answer
STRIDE = 4  # tokens between two looks for a loop
# As many tokens must equal those a period before: loops as short as the answers here.
REPEATS = {period: max(6, 2 * period) for period in range(1, 9)}

_SCHEMAS = [
    {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 6},
    {"enum": ["a", "ab", "abc", "\u00e4\u20ac", "abcd"]},
    {
        "type": "object",
        "properties": {"of": {"type": ["integer", "null"]}, "ok": {"type": "boolean"}},
        "required": ["of", "ok"],
        "additionalProperties": False,
    },
]
_LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65]


@dataclass
class _Written:
    """What would be written for a request without any limit, as far as it was asked for."""

    tokens: list[int]
    logprobs: list[float]
    rest: Iterator[tuple[int, float]]

    def reach(self, length: int) -> None:
        while len(self.tokens) < length:
            token, logprob = next(self.rest)
            self.tokens.append(token)
            self.logprobs.append(logprob)


class Alone:
    """Makes requests of some prompts, few for each, and keeps what is written for them."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, prompts: int) -> None:
        self.tokenizer, self._decoder, self._model = tokenizer, decoder, decoder.config
        self._ends = self._model.eos_token_ids
        self._written: dict[tuple, _Written] = {}
        rng = random.Random(0)
        self._prompts = [_prompt(self._model, rng, n) for n in range(prompts)]
        self._constraints = Constraints(
            tokenizer.serialize(), self._model.text.vocab_size, self._ends, 1
        )

    def draw(self, rng: random.Random, id: str) -> Request:
        number = rng.randrange(len(self._prompts))
        temperature, top_p = ((0.0, 1.0), (0.8, 1.0), (1.4, 0.8))[(number + rng.randrange(2)) % 3]
        schema = _SCHEMAS[number % len(_SCHEMAS)] if rng.random() < 0.3 else None
        sampling = Sampling(
            max_new_tokens=rng.choice([1, rng.randint(1, MOST_NEW), MOST_NEW, MOST_NEW]),
            temperature=temperature,
            top_p=top_p,
            seed=number,
            stop=rng.choice([(), (), (), ("e",), ("t ", "on", "zzz")]),
            stop_repetition=rng.random() < 0.4,
            json_schema=json.dumps(schema) if schema else None,
        )
        return replace(self._prompts[number], id=id, sampling=sampling)

    def result(self, request: Request) -> Result:
        """Looks at the whole answer from the start again at every token."""
        sampling, written = request.sampling, self._of(request)
        reason, kept, text, length = None, None, "", 0
        while not reason:
            length += 1
            written.reach(length)
            tokens = written.tokens[:length]
            text = self._text(tokens)
            found = [(text.find(stop) + len(stop), stop) for stop in sampling.stop if stop in text]
            if tokens[-1] in self._ends or found:
                text = text[: min(found)[0] - len(min(found)[1])] if found else text
                reason = FinishReason.STOP
            elif sampling.stop_repetition and (kept := _before_second_round(tokens)):
                text = self._text(tokens[:kept])
                reason = FinishReason.REPETITION
            elif length == sampling.max_new_tokens:
                reason = FinishReason.LENGTH
        ends = [len(self._text(written.tokens[: n + 1])) for n in range(length)]
        logprobs = written.logprobs[:length]
        return Result(
            id=request.id,
            text=text,
            token_ids=tuple(written.tokens[:length]),
            finish_reason=reason,
            prompt_tokens=len(request.token_ids),
            mean_logprob=sum(logprobs[:kept]) / len(logprobs[:kept]),
            token_logprobs=tuple(logprobs),
            token_ends=tuple(min(end, len(text)) for end in ends),
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token not in self._ends])

    def _of(self, request: Request) -> _Written:
        sampling = request.sampling
        key = (sampling.seed, sampling.temperature, sampling.json_schema)
        if key not in self._written:
            endless = replace(request, sampling=replace(sampling, max_new_tokens=MOST_NEW))
            schema = sampling.json_schema
            may_follow = self._may_follow(schema) if schema else None
            tokens = written_slowly(self._decoder, endless, may_follow)
            self._written[key] = _Written([], [], tokens)
        return self._written[key]

    def _may_follow(self, schema: str) -> Callable[[Sequence[int]], Sequence[bool]]:
        constraint = self._constraints.start(schema)

        def may_follow(written: Sequence[int]) -> Sequence[bool]:
            if written:
                assert self._constraints.advance([constraint], written[-1:]) == [True]
            words = self._constraints.masks([constraint])[0].tolist()
            return [bool(words[v // 32] >> v % 32 & 1) for v in range(self._model.text.vocab_size)]

        return may_follow


def _prompt(model: VL01Config, rng: random.Random, number: int) -> Request:
    """Every third one with an image: among other tokens, or alone."""
    length = rng.choice(_LENGTHS) if number % 2 else rng.randint(1, 30)
    text = [rng.randrange(300) for _ in range(length)]
    if number % 3:
        return Request("", np.array(text, dtype=np.int32))
    sides = rng.randint(1, 120), rng.randint(1, 120)
    size = rng.choice([sides, (300, 2), (1, 90), (56, 28), (1, 1)])
    layout = choose_layout(*size, model.pinpoints, model.vision.image_size, model.vision.patch_size)
    at = rng.choice([0, 1, length // 2, length])
    ids = text[:at] + [model.image_token_id] * layout.tokens + text[at:]
    shape = (layout.tiles, layout.tile, layout.tile, 3)
    tiles = np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)
    return Request("", np.array(ids, dtype=np.int32), tiles, size)


def _before_second_round(tokens: Sequence[int]) -> int | None:
    if len(tokens) % STRIDE:
        return None
    for period, repeats in REPEATS.items():
        again = [n >= period and tokens[n] == tokens[n - period] for n in range(len(tokens))]
        if len(tokens) >= repeats + period and all(again[-repeats:]):
            return max(n + 1 for n, same in enumerate(again) if not same)
    return None
