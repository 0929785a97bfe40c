"""The same plain code on a CUDA device: loaded there, computed there, near what a CPU computes."""

import pytest
import torch

from model.decoder import Decoder
from model.layers.memory import LayerMemory
from model.layers.ragged import RaggedBatch
from model.weights.checkpoint import load_decoder
from tests.model.conftest import write_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS = range(8)


@pytest.fixture(scope="module")
def calm_checkpoint(tmp_path_factory):
    """Without the usual gains, with which rounding grows from layer to layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.nano.random_checkpoint._GAINS", {})
        return write_tiny(tmp_path_factory.mktemp("calm"))


def logits_of(decoder: Decoder, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A prompt with an image in two chunks, beside a decoding sequence, then one step each."""
    generator = torch.Generator().manual_seed(0)
    config = decoder.config
    tiles = torch.randint(0, 256, (3, 56, 56, 3), generator=generator).to(torch.uint8)
    features = decoder.image_features(tiles, (112, 56))
    image = torch.full((len(features),), config.image_token_id)
    prompt = torch.cat([torch.randint(0, 500, (80,), generator=generator), image])
    other = torch.randint(0, 500, (66,), generator=generator)
    memory = LayerMemory(config.text, LAYERS, slots=3, blocks=9, dtype=dtype, device=device)
    tables, seen = ([4, 2, 8], [1, 7]), []
    for ids, at, lengths, contexts in [
        (torch.cat([prompt[:64], other[:64]]), None, [64, 64], [0, 0]),
        (torch.cat([prompt[64:], other[64:65]]), 16, [len(prompt) - 64, 1], [64, 64]),
        (torch.cat([prompt[:1], other[65:]]), None, [1, 1], [len(prompt), 65]),
    ]:
        images = [] if at is None else [(at, features)]
        batch = RaggedBatch.build(lengths, contexts, [2, 0], tables, device)
        hidden = decoder(decoder.embed(ids.to(device), images), batch, memory)
        seen.append(decoder.logits(hidden).cpu())
    return torch.cat(seen)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_cuda_computes_what_a_cpu_computes(calm_checkpoint, quantization):
    def run(device: str, dtype: torch.dtype) -> torch.Tensor:
        decoder = load_decoder(
            calm_checkpoint, LAYERS, dtype=dtype, device=device, quantization=quantization
        )
        return logits_of(decoder, device, dtype)

    exact = run("cpu", torch.float32)
    finite = exact.isfinite()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.06)):
        error = (run("cuda", dtype) - exact)[finite].norm() / exact[finite].norm()
        assert error < tolerance, dtype


def test_weights_quantized_on_the_device_are_those_quantized_on_a_cpu(calm_checkpoint):
    on = {
        device: load_decoder(calm_checkpoint, LAYERS, dtype=torch.bfloat16, device=device)
        for device in ("cpu", "cuda")
    }
    theirs = dict(on["cuda"].named_parameters())
    for name, parameter in on["cpu"].named_parameters():
        assert theirs[name].is_cuda
        assert torch.equal(theirs[name].cpu(), parameter), name
