"""The training forward against the Decoder of the engine, on the same weights."""

import shutil

import pytest
import torch

from model.decoder import Decoder
from model.inputs.tiling import choose_layout
from model.layers.memory import LayerMemory
from model.layers.ragged import RaggedBatch
from model.nano.network import CHUNK, Steps, carry, chunks, embed_pages, run_layers, see
from model.weights.checkpoint import load_decoder

LAYERS = range(8)
SIZES = [(100, 100), (112, 60)]  # pixels; tiles are 56


@pytest.fixture(scope="module")
def decoder(checkpoint) -> Decoder:
    return load_decoder(checkpoint, LAYERS, dtype=torch.float32, device="cpu", quantization="none")


def engine_logits(decoder, prefix, tiles, size, answer) -> torch.Tensor:
    """Of every token of the answer, the prompt computed first, as the engine does."""
    features = decoder.image_features(tiles, size)
    image = [decoder.config.image_token_id] * len(features)
    ids = torch.tensor([*prefix, *image, *answer])
    hidden = decoder.embed(ids, [(len(prefix), features)])
    blocks = range(-(-len(ids) // 64))
    memory = LayerMemory(
        decoder.config.text, LAYERS, slots=1, blocks=len(blocks), dtype=torch.float32, device="cpu"
    )
    batch = RaggedBatch.build([len(ids)], [0], [0], [blocks])
    return decoder.logits(decoder(hidden, batch, memory))[-len(answer) :]


@pytest.mark.parametrize("size", SIZES)
def test_training_computes_what_the_engine_computes(decoder, size):
    compare_with_engine(decoder, size, Steps())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_training_computes_what_the_engine_computes(decoder):
    compare_with_engine(decoder, SIZES[0], Steps(compiled=True))


def compare_with_engine(decoder, size, steps):
    """Two questions to each of two pages, as far as the logits of their tokens."""
    generator = torch.Generator().manual_seed(0)
    vision = decoder.config.vision
    pinpoints = decoder.config.pinpoints
    layout = choose_layout(size[0], size[1], pinpoints, vision.image_size, vision.patch_size)
    shape = (2, layout.tiles, vision.image_size, vision.image_size, 3)
    tiles = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    answers = torch.randint(0, 500, (4, 2 * CHUNK), generator=generator)
    prefix = [1, 2, 3]

    mean, std = (torch.tensor(x) for x in (decoder.config.image_mean, decoder.config.image_std))
    features = see(decoder, ((tiles / 255 - mean) / std).flatten(0, 1), steps)
    start = len(prefix) + layout.tokens
    padding = -start % CHUNK
    assert padding
    embedded = embed_pages(decoder, features, layout, torch.tensor(prefix), start + padding)
    page = run_layers(decoder, embedded, steps, padding=padding)
    hidden = decoder.embed_tokens(answers)
    last = run_layers(decoder, hidden, steps, memories=page.memories, start=start).hidden[-1]
    trained = decoder.lm_head(decoder.norm(last.flatten(0, 1))).unflatten(0, answers.shape)

    for i in range(4):
        expected = engine_logits(decoder, prefix, tiles[i % 2], size, answers[i].tolist())
        known = torch.isfinite(expected)  # the engine rules out the image token
        torch.testing.assert_close(trained[i][known], expected[known], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [CHUNK, 3 * CHUNK])
@pytest.mark.parametrize("goes_on", [False, True])
def test_chunks_of_lightning_attention_are_its_recurrence(length, goes_on):
    """Two pages, or two questions to each of two pages."""
    generator = torch.Generator().manual_seed(length)
    rows = 4 if goes_on else 2
    parts = torch.randn(rows, length, 4, 3, 8, generator=generator)
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.0])
    first = torch.randn(4, 2, 64, generator=generator) if goes_on else None
    q, inside, update = chunks(parts.flatten(2).flatten(0, 1), slopes)
    states, last = carry(update, slopes, rows, first)
    o = (inside + q @ states).permute(1, 2, 0, 3).reshape(rows, length, 4, 8)
    expected = torch.zeros(rows, 4, 8, 8)
    if first is not None:
        expected = first.unflatten(2, (8, 8)).transpose(0, 1).repeat(2, 1, 1, 1)
    q, k, v = parts.unbind(3)
    for t in range(length):
        expected = torch.exp(-slopes)[:, None, None] * expected
        expected = expected + k[:, t, :, :, None] * v[:, t, :, None]
        step = (q[:, t, :, None] @ expected).squeeze(2)
        torch.testing.assert_close(o[:, t], step, rtol=1e-4, atol=1e-3)
    if last is not None:
        last = last.unflatten(2, (8, 8)).transpose(0, 1)
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-3)


def test_gradients_reach_every_weight(decoder):
    layout = choose_layout(100, 100, decoder.config.pinpoints, 56, 14)
    decoder.requires_grad_()
    try:
        pixels = torch.randn(layout.tiles, 56, 56, 3, generator=torch.Generator().manual_seed(1))
        start = 2 + layout.tokens
        padding = -start % CHUNK
        features = see(decoder, pixels, Steps())
        prefix = torch.tensor([1, 2])
        embedded = embed_pages(decoder, features, layout, prefix, start + padding)
        hidden = run_layers(decoder, embedded, Steps(), padding=padding).hidden[-1]
        decoder.lm_head(decoder.norm(hidden.flatten(0, 1))).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)
        without = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []
    finally:
        decoder.requires_grad_(False)
        decoder.zero_grad()
