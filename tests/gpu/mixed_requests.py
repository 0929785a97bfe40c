"""Requests of mixed lengths and kinds without end, and the books of what became of each."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np

from model.config import VL01Config
from model.inputs.tiling import choose_layout
from schemas.requests import FinishReason, Request, Result, Sampling

# An array that no answer here comes to the end of.
_ITEMS = {"type": "array", "items": {"enum": ["yes", "no", "perhaps"]}, "minItems": 5000}
_HELD = json.dumps(_ITEMS)
_HELD_BEGINS = '["'

# How a request is sampled, by name, and how many of a hundred are.
KINDS = {
    "greedy": (55, Sampling()),
    "sampled": (15, Sampling(temperature=1.0)),
    "top-p": (10, Sampling(temperature=0.7, top_p=0.9)),
    "stopped": (8, Sampling(temperature=1.0, stop=("e",))),
    "in circles": (7, Sampling(stop_repetition=True)),
    "held": (5, Sampling(temperature=1.0, json_schema=_HELD)),
}
_IMAGE_SIZES = ((640, 480), (300, 300), (1240, 1754), (1654, 2339), (2000, 500))


@dataclass(frozen=True)
class Lengths:
    """Tokens, from `least` to `most`, as often of 100 to 200 as of 1,000 to 2,000."""

    least: int
    most: int

    def draw(self, rng: np.random.Generator, most: int) -> int:
        """`most` of them, or fewer."""
        top = max(self.least, min(self.most, most))
        drawn = math.exp(rng.uniform(math.log(self.least), math.log(top + 1)))
        return min(top, int(drawn))


@dataclass(frozen=True)
class _Image:
    size: tuple[int, int]
    tokens: int
    tiles: np.ndarray


class Stream:
    """`next` makes one request after the other, the same ones for a seed and the same calls.

    images: the share of requests with one, of those whose prompt has room for it.
    """

    def __init__(
        self, model: VL01Config, prompt: Lengths, new: Lengths, seed: int, images: float = 0.3
    ) -> None:
        self._model, self._prompt, self._new = model, prompt, new
        self._rng = np.random.default_rng(seed)
        self._with_image = images
        self._images = [_image(model, size, self._rng) for size in _IMAGE_SIZES]
        self._names = list(KINDS)
        shares = np.array([share for share, _ in KINDS.values()])
        self._shares = shares / shares.sum()

    def next(self, id: str, most_new: int, kind: str | None = None) -> Request:
        """With an answer of `most_new` tokens or fewer. kind: None is any."""
        rng = self._rng
        kind = kind or str(rng.choice(self._names, p=self._shares))
        new = self._new.draw(rng, most_new)
        seed = int(rng.integers(2**31))
        sampling = replace(KINDS[kind][1], max_new_tokens=new, seed=seed)
        ids = rng.integers(
            0,
            self._model.text.vocab_size - 1,
            self._prompt.draw(rng, self._prompt.most),
            dtype=np.int32,
        )
        ids += ids >= self._model.image_token_id  # any token but the image's
        fitting = [image for image in self._images if image.tokens + 2 <= len(ids)]
        if not fitting or rng.random() > self._with_image:
            return Request(id, ids, sampling=sampling)
        image = fitting[rng.integers(len(fitting))]
        start = int(rng.integers(1, len(ids) - image.tokens))
        ids[start : start + image.tokens] = self._model.image_token_id
        return Request(id, ids, image.tiles, image.size, sampling)


def _image(model: VL01Config, size: tuple[int, int], rng: np.random.Generator) -> _Image:
    tile = model.vision.image_size
    layout = choose_layout(*size, model.pinpoints, tile, model.vision.patch_size)
    tiles = rng.integers(0, 256, (layout.tiles, tile, tile, 3), dtype=np.uint8)
    return _Image(size, layout.tokens, tiles)


class Books:
    """Who asked for what and has no answer yet; `wrong` tells what is not as it was asked for."""

    def __init__(self) -> None:
        self._open: dict[str, Request] = {}
        self._closed: set[str] = set()
        self.wrong: list[str] = []

    @property
    def answered(self) -> int:
        return len(self._closed)

    @property
    def unanswered(self) -> list[str]:
        return list(self._open)

    def ask(self, request: Request) -> None:
        self._open[request.id] = request

    def answer(self, result: Result) -> None:
        request = self._open.pop(result.id, None)
        if request is None:
            twice = "a second time" if result.id in self._closed else "though it never asked"
            self.wrong.append(f"request {result.id} was answered {twice}")
            return
        self._closed.add(result.id)
        if fault := _fault(request, result):
            self.wrong.append(f"the answer to request {result.id} {fault}")


def _fault(request: Request, result: Result) -> str:
    """What is wrong with an answer, if anything."""
    sampling, written = request.sampling, len(result.token_ids)
    if result.prompt_tokens != len(request.token_ids):
        return f"counts {result.prompt_tokens} prompt tokens, asked {len(request.token_ids)}"
    if not written == len(result.token_logprobs) == len(result.token_ends):
        return f"has {written} tokens and {len(result.token_logprobs)} probabilities of them"
    if not all(logprob <= 0 for logprob in result.token_logprobs):  # nor is NaN
        return f"has a token of log-probability {max(result.token_logprobs)}"
    early = {
        FinishReason.STOP: bool(sampling.stop),
        FinishReason.REPETITION: sampling.stop_repetition,
    }
    full = result.finish_reason == FinishReason.LENGTH and written == sampling.max_new_tokens
    if not full and not (early.get(result.finish_reason) and written <= sampling.max_new_tokens):
        return (
            f"ended by {result.finish_reason} after {written} of {sampling.max_new_tokens} tokens"
        )
    if sampling.json_schema and not _HELD_BEGINS.startswith(result.text[: len(_HELD_BEGINS)]):
        return f"does not follow its schema: {result.text[:40]!r}"
    return ""
