"""A few steps of training on a CPU: it learns, goes on where it stopped, and can be exported."""

import json
from dataclasses import replace

import pytest
import torch

from model.config import load_config
from model.nano.export import export
from model.nano.optimizer import orthogonal
from model.nano.sizes import NANO
from model.nano.train import Settings, Training, train
from model.weights.checkpoint import load_decoder

TINY = replace(
    NANO,
    layers=8,
    hidden_size=32,
    heads=2,
    head_dim=16,
    intermediate_size=32,
    vision_layers=1,
    vision_hidden_size=32,
    vision_heads=2,
    vision_intermediate_size=32,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    state = tmp_path_factory.mktemp("state")
    return Settings(
        state, 600, device="cpu", workers=0, tokens=2400, size=TINY, most_batches=4, log_every=1
    )


@pytest.fixture(scope="module")
def trained(settings) -> Training:
    return train(settings)


def curve(settings) -> list[dict]:
    return [json.loads(line) for line in (settings.state / "curve.jsonl").open()]


def test_the_losses_fall_from_the_first_steps(settings, trained):
    characters = [row["characters"] for row in curve(settings)]
    assert characters[-1] < characters[0]


def test_a_sitting_goes_on_from_what_the_last_one_left(settings, trained):
    again = Training(settings)
    assert again.number == trained.number == 4
    for (name, kept), (_, saved) in zip(
        again.decoder.named_parameters(), trained.decoder.named_parameters(), strict=True
    ):
        torch.testing.assert_close(kept, saved, rtol=1e-2, atol=1e-2, msg=name)  # kept in bf16


def test_the_state_travels_in_small_files(settings, trained):
    sizes = [path.stat().st_size for path in settings.state.glob("state-*.safetensors")]
    assert 0 < max(sizes) < 16 << 20


def test_the_export_loads_as_any_checkpoint(settings, trained, tmp_path):
    export(trained.decoder, tmp_path, size=TINY)
    layers = range(load_config(tmp_path).text.num_layers)
    loaded = load_decoder(
        tmp_path, layers, dtype=torch.float32, device="cpu", quantization="none"
    ).state_dict()
    for name, weight in trained.decoder.state_dict().items():
        assert torch.equal(loaded[name], weight.bfloat16().float()), name


def test_muon_makes_singular_values_equal():
    matrices = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5
