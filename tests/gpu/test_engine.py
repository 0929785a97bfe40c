"""The engine through the kernels: its greedy tokens against the plain code in fp32 on a CPU."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from model.config import load_config
from model.decoder import Decoder
from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.layers.dispatch import plain_layers
from model.layers.memory import LayerMemory
from model.layers.ragged import BLOCK_TOKENS, RaggedBatch
from model.nano.random_checkpoint import write_random_checkpoint
from model.weights.checkpoint import load_decoder
from schemas.requests import FinishReason, Request, Sampling
from tests.model.engine.conftest import make_request, text_request, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS: Any = {"device": "cuda", "dtype": "bfloat16", "chunk_tokens": 256, "cache_bytes": 2**28}


@pytest.fixture(scope="module", params=[128, 32], ids=lambda size: f"heads of {size}")
def checkpoint(request, tmp_path_factory):
    """Without the usual gains, with which rounding grows from layer to layer, and with all experts
    for every token: another choice of experts, which rounding can make, changes everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.nano.random_checkpoint._GAINS", {})
        return write_random_checkpoint(
            tmp_path_factory.mktemp("calm"),
            head_dim=request.param,
            tile=56,
            hidden_size=256,
            experts=4,
            experts_per_token=4,
        )


@pytest.fixture(scope="module")
def requests(checkpoint) -> list[Request]:
    """With images and without, one token to three blocks long."""
    model = load_config(checkpoint)
    images = [make_request(model, seed) for seed in range(0, 12, 3)]  # the greedy ones
    lengths = (1, 63, 64, 65, 128, 200)
    return images + [text_request(f"text-{n}", n, max_new_tokens=40) for n in lengths]


@torch.inference_mode()
def logits_along(decoder: Decoder, request: Request, written: tuple[int, ...]) -> torch.Tensor:
    """fp32 [N, V]: what the decoder says before each of the N written tokens, in one pass."""
    config, prompt = decoder.config, torch.from_numpy(request.token_ids).long()
    ids = torch.cat([prompt, torch.tensor(written[:-1], dtype=torch.int64)])
    features = []
    if request.tiles is not None and request.image_size is not None:
        start = int(np.argmax(request.token_ids == config.image_token_id))
        tiles = torch.from_numpy(request.tiles)
        features = [(start, decoder.image_features(tiles, request.image_size))]
    blocks = list(range(-(-len(ids) // BLOCK_TOKENS)))
    dtype = decoder.embed_tokens.weight.dtype
    memory = LayerMemory(
        config.text, decoder.span, slots=1, blocks=len(blocks), dtype=dtype, device="cpu"
    )
    batch = RaggedBatch.build([len(ids)], [0], [0], [blocks])
    hidden = decoder(decoder.embed(ids, features), batch, memory)
    return decoder.logits(hidden[len(prompt) - 1 :])


@pytest.mark.parametrize(
    ("quantization", "ranks"), [("int8", 1), ("none", 1), ("int8", 2), ("int8", 4)]
)
def test_greedy_tokens_are_the_references_wherever_rounding_cannot_change_them(
    checkpoint, requests, quantization, ranks
):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    config = EngineConfig(str(checkpoint), ranks=ranks, quantization=quantization, **SETTINGS)
    with Engine(config) as engine:
        written = token_ids(list(engine.generate(requests)))
    exact, rounded = (
        load_decoder(checkpoint, range(8), dtype=dtype, device="cpu", quantization=quantization)
        for dtype in (torch.float32, torch.bfloat16)
    )
    logits = {r.id: logits_along(exact, r, written[r.id]) for r in requests}
    errors = [
        (logits_along(rounded, r, written[r.id]) - logits[r.id]).nan_to_num(0).abs().max()
        for r in requests
    ]
    compared = total = 0
    for request in requests:
        best = logits[request.id].topk(2)
        clear = best.values.diff(dim=1).abs()[:, 0] > 2 * max(errors)
        tokens = torch.tensor(written[request.id])
        assert torch.equal(tokens[clear], best.indices[clear, 0]), request.id
        compared, total = compared + int(clear.sum()), total + len(tokens)
    assert compared > 0.5 * total, "hardly anything was compared"


def test_the_same_requests_get_the_same_tokens_every_time(checkpoint, requests):
    with Engine(EngineConfig(str(checkpoint), **SETTINGS)) as engine:
        first, second = (token_ids(list(engine.generate(requests))) for _ in range(2))
    assert first == second


def test_held_answers_follow_their_schema_beside_free_ones(checkpoint, requests):
    """The masks travel to the GPU while it computes: one late or in the wrong row would show."""
    schemas = [{"enum": [f"row {n}", f"row {n} twice"]} for n in range(40)]
    held = [
        Request(
            f"held-{n}",
            text_request("", 20 + n).token_ids,
            sampling=Sampling(temperature=1.0, seed=n, json_schema=json.dumps(schema)),
        )
        for n, schema in enumerate(schemas)
    ]
    with Engine(EngineConfig(str(checkpoint), **SETTINGS)) as engine:
        results = {r.id: r for r in engine.generate([*requests[:3], *held, *requests[3:]])}
    assert len(results) == len(requests) + len(held)
    for n, schema in enumerate(schemas):
        result = results[f"held-{n}"]
        assert result.finish_reason == FinishReason.STOP
        assert json.loads(result.text) in schema["enum"]


def test_the_plain_code_can_be_asked_for(checkpoint, requests, monkeypatch):
    monkeypatch.setattr("model.layers.kernels.experts", lambda *_: 1 / 0)
    with plain_layers(), Engine(EngineConfig(str(checkpoint), **SETTINGS)) as engine:
        (result,) = engine.generate(requests[-1:])
    assert len(result.token_ids)
