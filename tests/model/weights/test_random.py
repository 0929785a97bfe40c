"""Random weights stand in for real ones when speed is measured: they must compute like them."""

import pytest
import torch

from model.config import load_config
from model.layers.memory import LayerMemory
from model.layers.ragged import RaggedBatch
from model.nano.random_checkpoint import NanoSizes, write_configuration
from model.weights.checkpoint import check_checkpoint
from model.weights.random import random_decoder
from model.weights.revision import checkpoint_revision
from schemas.errors import CheckpointError

SIZES = NanoSizes(
    layers=80, hidden_size=32, heads=2, kv_heads=1, head_dim=16, experts=4,
    intermediate_size=32, vocab_size=640, vision_hidden_size=32, tile=56,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a checkpoint of 80 layers holds besides its tensors."""
    folder = tmp_path_factory.mktemp("configuration")
    write_configuration(folder, SIZES)
    return folder


def parameters(folder, span: range, **settings) -> dict[str, torch.Tensor]:
    how = {"dtype": torch.float32, "device": "cpu"} | settings
    return dict(random_decoder(load_config(folder), span, **how).named_parameters())


def test_ranks_hold_the_random_weights_that_one_rank_would(folder):
    whole = parameters(folder, range(80))
    parts = parameters(folder, range(30)) | parameters(folder, range(30, 80))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    other = parameters(folder, range(80), seed=1)
    assert not torch.equal(other["layers.3.moe.w2"], whole["layers.3.moe.w2"])
    assert not torch.equal(whole["layers.4.moe.w2"], whole["layers.3.moe.w2"])


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic", "none"])
def test_activations_stay_finite_and_near_one_through_all_80_layers(folder, quantization):
    where = {"dtype": torch.bfloat16, "device": "cpu"}
    decoder = random_decoder(load_config(folder), range(80), quantization=quantization, **where)
    memory = LayerMemory(decoder.config.text, range(80), slots=1, blocks=4, **where)
    batch = RaggedBatch.build([200], [0], [0], [range(4)])
    hidden = decoder(decoder.embed(torch.arange(200)), batch, memory)
    assert hidden.isfinite().all()
    logits = decoder.logits(hidden)[:, :500]
    assert 0.2 < logits.float().std() < 5


def test_a_checkpoint_without_tensors_has_a_revision_only_for_random_weights(folder):
    assert len(checkpoint_revision(folder, tensors=False)) == 12
    with pytest.raises(CheckpointError, match="has no model"):
        checkpoint_revision(folder)
    with pytest.raises(CheckpointError, match="has no model"):
        check_checkpoint(folder)
