"""A few steps of training on a CPU: it learns, goes on where it stopped, and can be exported."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from model.config import load_config
from model.nano import network
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
    answer = [row["answer"] for row in curve(settings)]  # the hints depend on how full a page is
    assert answer[-1] < answer[0]


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


def test_the_tower_learns_alone_and_nothing_else_moves(settings, trained, tmp_path):
    shutil.copytree(settings.state, tmp_path, dirs_exist_ok=True)
    alone = train(replace(settings, state=tmp_path, vision=600, tiles=2, most_batches=2))
    assert alone.number == trained.number + 2
    before = dict(Training(settings).decoder.named_parameters())
    moved = {n for n, p in alone.decoder.named_parameters() if not torch.equal(p, before[n])}
    assert "vision_tower.patch_embedding" in moved
    assert {name.split(".")[0] for name in moved} == {"vision_tower", "projector"}


def test_a_step_that_cannot_be_compiled_is_run_as_it_is(settings, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(network.torch, "compile", lambda *_, **__: broken)
    here = replace(settings, state=tmp_path, compiled=True, most_batches=1)
    assert train(here).number == 1


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
