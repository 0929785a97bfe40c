"""The training forward against the Decoder of the engine, on the same weights."""

import pytest
import torch

from model.decoder import Decoder
from model.inputs.tiling import choose_layout
from model.layers.memory import LayerMemory
from model.layers.ragged import RaggedBatch
from model.nano.network import CHUNK, Runner, embed_pages, lightning, whole_chunks
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
    generator = torch.Generator().manual_seed(0)
    vision = decoder.config.vision
    pinpoints = decoder.config.pinpoints
    layout = choose_layout(size[0], size[1], pinpoints, vision.image_size, vision.patch_size)
    shape = (2, layout.tiles, vision.image_size, vision.image_size, 3)
    tiles = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    answers = torch.randint(0, 500, (2, 2 * CHUNK), generator=generator)
    prefix = [1, 2, 3]

    mean, std = (torch.tensor(x) for x in (decoder.config.image_mean, decoder.config.image_std))
    embedded = embed_pages(decoder, (tiles / 255 - mean) / std, layout, prefix)
    run = Runner(decoder)
    whole, padding = whole_chunks(embedded)
    assert padding
    page = run(whole, padding=padding)
    memories = [output.memory for output in page]
    hidden = decoder.embed_tokens(answers)
    last = run(hidden, memories, embedded.shape[1])[-1].hidden
    trained = decoder.lm_head(decoder.norm(last.flatten(0, 1))).unflatten(0, answers.shape)

    for i in range(2):
        expected = engine_logits(decoder, prefix, tiles[i], size, answers[i].tolist())
        known = torch.isfinite(expected)  # the engine rules out the image token
        torch.testing.assert_close(trained[i][known], expected[known], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [CHUNK, 3 * CHUNK])
def test_chunks_of_lightning_attention_are_its_recurrence(length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, length, 4, 8, generator=generator)
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.0])
    state = torch.randn(2, 4, 8, 8, generator=generator)
    o, last = lightning(q, k, v, slopes, state)
    expected = state
    for t in range(length):
        expected = torch.exp(-slopes)[:, None, None] * expected
        expected = expected + k[:, t, :, :, None] * v[:, t, :, None]
        step = (q[:, t, :, None] @ expected).squeeze(2)
        torch.testing.assert_close(o[:, t], step, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-3)


def test_gradients_reach_every_weight(decoder):
    layout = choose_layout(100, 100, decoder.config.pinpoints, 56, 14)
    decoder.requires_grad_()
    try:
        pixels = torch.randn(1, layout.tiles, 56, 56, 3, generator=torch.Generator().manual_seed(1))
        whole, padding = whole_chunks(embed_pages(decoder, pixels, layout, [1, 2]))
        hidden = Runner(decoder)(whole, padding=padding)[-1].hidden
        decoder.lm_head(decoder.norm(hidden.flatten(0, 1))).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)
        without = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []
    finally:
        decoder.requires_grad_(False)
        decoder.zero_grad()
