"""A tiny random checkpoint, requests for it, and the slow twin of the engine."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import VL01Config, load_config
from model.decoder import Decoder
from model.engine import rank_host
from model.engine.sampling import Draw, choose, uniform
from model.inputs.tiling import choose_layout
from model.layers.memory import LayerMemory, block_bytes, slot_bytes
from model.layers.ragged import BLOCK_TOKENS, RaggedBatch
from model.nano.random_checkpoint import write_random_checkpoint
from model.weights.checkpoint import load_decoder
from schemas.requests import Request, Sampling
from tests.model.engine import troubled_worker
from tests.model.engine.troubled_worker import Trouble


@pytest.fixture
def trouble(monkeypatch) -> Callable[..., None]:
    """Takes what the ranks of engines made from now on will meet; troubled_worker.py says how."""

    def meet(*troubles: Trouble) -> None:
        monkeypatch.setattr(rank_host, "WORKER", troubled_worker.NAME)
        monkeypatch.setenv("TROUBLES", json.dumps(troubles))

    return meet


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        seed=3,
        tile=56,
        hidden_size=64,
        heads=2,
        kv_heads=1,
        experts=4,
        intermediate_size=64,
        vision_hidden_size=32,
        vision_intermediate_size=64,
    )


@pytest.fixture(scope="session")
def model(checkpoint) -> VL01Config:
    return load_config(checkpoint)


@pytest.fixture(scope="session")
def decoder(checkpoint, model) -> Decoder:
    return load_decoder(checkpoint, range(model.text.num_layers), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def requests(model) -> list[Request]:
    """Greedy and sampled, with an image and without, prompts that end on and beside a block."""
    return [make_request(model, seed) for seed in range(8)] + [
        text_request(f"text-{length}", length, max_new_tokens=12) for length in (1, 64, 65, 128)
    ]


@pytest.fixture(scope="session")
def expected(decoder, requests) -> dict[str, tuple[int, ...]]:
    """Request id -> token ids by the slow twin."""
    return {request.id: generate_slowly(decoder, request) for request in requests}


def make_request(model: VL01Config, seed: int) -> Request:
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(30, 300, 2))
    layout = choose_layout(width, height, model.pinpoints, model.vision.image_size)
    before, after = (rng.integers(0, 300, rng.integers(3, 60)) for _ in range(2))
    image = np.full(layout.tokens, model.image_token_id)
    return Request(
        id=f"image-{seed}",
        token_ids=np.concatenate([before, image, after]).astype(np.int32),
        tiles=rng.integers(0, 256, (layout.tiles, 56, 56, 3), dtype=np.uint8),
        image_size=(width, height),
        sampling=Sampling(
            max_new_tokens=int(rng.integers(1, 40)),
            temperature=(0.0, 0.7, 1.3)[seed % 3],
            top_p=(1.0, 0.9)[seed % 2],
            seed=seed,
        ),
    )


def text_request(id: str, length: int, **sampling) -> Request:
    tokens = np.random.default_rng(length).integers(0, 300, length).astype(np.int32)
    return Request(id=id, token_ids=tokens, sampling=Sampling(**sampling))


def generate_slowly(
    decoder: Decoder,
    request: Request,
    may_follow: Callable[[Sequence[int]], Sequence[bool]] | None = None,
) -> tuple[int, ...]:
    """The tokens of one request alone."""
    return tuple(token for token, _ in written_slowly(decoder, request, may_follow))


@torch.inference_mode()
def written_slowly(
    decoder: Decoder,
    request: Request,
    may_follow: Callable[[Sequence[int]], Sequence[bool]] | None = None,
) -> Iterator[tuple[int, float]]:
    """The tokens and their log-probabilities of one request alone: its whole prompt at once, then
    token by token. No engine.

    may_follow: which tokens of the vocabulary may follow these written ones.
    """
    config, sampling = decoder.config, request.sampling
    total = len(request.token_ids) + sampling.max_new_tokens
    blocks = list(range(-(-total // BLOCK_TOKENS)))
    memory = LayerMemory(
        config.text, decoder.span, slots=1, blocks=len(blocks), dtype=torch.float32, device="cpu"
    )
    features = []
    if request.tiles is not None and request.image_size is not None:
        start = int(np.argmax(request.token_ids == config.image_token_id))
        tiles = torch.from_numpy(request.tiles)
        features = [(start, decoder.image_features(tiles, request.image_size))]
    hidden = decoder.embed(torch.from_numpy(request.token_ids).long(), features)
    context, written = 0, []
    while True:
        batch = RaggedBatch.build([len(hidden)], [context], [0], [blocks])
        hidden = decoder(hidden, batch, memory)[-1:]
        context += batch.lengths[0]
        draw = Draw(sampling.temperature, sampling.top_p, uniform(sampling.seed, context))
        logits = decoder.logits(hidden)
        logprobs = torch.log_softmax(logits[0], dim=-1)
        if may_follow:
            logits[0, ~torch.tensor(may_follow(written))] = float("-inf")
        token = int(choose(logits, [draw])[0])
        written.append(token)
        yield token, float(logprobs[token])
        if token in config.eos_token_ids or len(written) == sampling.max_new_tokens:
            return
        hidden = decoder.embed(torch.tensor([token]))


def tight_memory(model: VL01Config, span: range, slots: int, blocks: int) -> dict[str, int]:
    """Settings of an engine with exactly so much memory on the rank that holds `span`."""
    slot = slot_bytes(model.text, span, torch.float32, packed=False)
    block = block_bytes(model.text, span, torch.float32)
    return {
        "cache_bytes": slots * slot + blocks * block,
        "max_sequences": slots,
        "tokens_per_sequence": BLOCK_TOKENS,
    }


def token_ids(results: Sequence) -> dict[str, tuple[int, ...]]:
    assert len({result.id for result in results}) == len(results)
    return {result.id: result.token_ids for result in results}
