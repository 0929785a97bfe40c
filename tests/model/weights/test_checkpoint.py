"""Every tensor of a checkpoint must be accounted for, and a rank must read only its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.weights.checkpoint import check_checkpoint, load_decoder
from model.weights.index import INDEX
from model.weights.names import checkpoint_tensors
from model.weights.quantization import quantize
from model.weights.reader import ShardReader
from model.weights.revision import checkpoint_revision
from schemas.errors import CheckpointError
from tests.model.conftest import write_tiny

GATE = "language_model.model.layers.2.block_sparse_moe.gate.weight"
CPU = {"dtype": torch.float32, "device": "cpu"}


def all_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read by safetensors itself, not by the code under test."""
    shards = sorted(checkpoint.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def rewritten(checkpoint: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same checkpoint with these tensors, in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.glob("*.json"):
        shutil.copy(file, folder)
    names = sorted(tensors)
    weight_map = {}
    for i, shard in enumerate(("a.safetensors", "b.safetensors")):
        part = {name: tensors[name].contiguous() for name in names[i::2]}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load_whole(checkpoint: Path, **kwargs):
    return load_decoder(checkpoint, range(8), **CPU, **kwargs)


@pytest.fixture
def tensors(checkpoint) -> dict[str, torch.Tensor]:
    return all_tensors(checkpoint)


def test_every_parameter_is_filled_from_the_tensor_of_its_name(checkpoint, tensors, monkeypatch):
    # Whatever the loader leaves alone stays NaN (or -128 in int8) and is found.
    def poisoned(*shape, dtype, device):
        fill = -128 if dtype == torch.int8 else float("nan")
        return torch.nn.Parameter(torch.full(shape, fill, dtype=dtype), requires_grad=False)

    for module in ("linear", "norm", "moe"):
        monkeypatch.setattr(f"model.layers.{module}.empty_weight", poisoned)
    monkeypatch.setattr("model.vision.tower.empty_weight", poisoned)
    monkeypatch.setattr("model.decoder.empty_weight", poisoned)
    for quantization in ("none", "int8"):
        decoder = load_whole(checkpoint, quantization=quantization)
        for name, parameter in decoder.named_parameters():
            unfilled = parameter == -128 if parameter.dtype == torch.int8 else parameter.isnan()
            assert not unfilled.any(), name


def test_stacked_parameters_hold_their_tensors_in_order(checkpoint, tensors):
    parameters = dict(load_whole(checkpoint).named_parameters())
    layer = "language_model.model.layers.7"
    qkv = [quantize(tensors[f"{layer}.self_attn.{x}_proj.weight"])[0] for x in "qkv"]
    assert torch.equal(parameters["layers.7.attention.qkv_proj.weight"], torch.cat(qkv))
    for expert in range(4):
        w1, w3, w2 = (
            quantize(tensors[f"{layer}.block_sparse_moe.experts.{expert}.{x}.weight"])
            for x in ("w1", "w3", "w2")
        )
        for i, suffix in enumerate(("", "_scale")):
            stacked = parameters[f"layers.7.moe.w13{suffix}"][expert]
            assert torch.equal(stacked, torch.cat([w1[i], w3[i]]))
            assert torch.equal(parameters[f"layers.7.moe.w2{suffix}"][expert], w2[i])
    assert torch.equal(parameters["layers.2.moe.gate.weight"], tensors[GATE].float())


def test_pieces_of_a_tensor_make_the_same_weights_as_the_whole(checkpoint, monkeypatch):
    whole = dict(load_whole(checkpoint).named_parameters())
    for module in ("shards", "reader"):
        monkeypatch.setattr(f"model.weights.{module}.PIECE_BYTES", 1)  # a row at a time
    for name, parameter in load_whole(checkpoint).named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_a_rank_reads_its_own_tensors_and_no_other(checkpoint, monkeypatch):
    read = []
    pieces = ShardReader.pieces

    def counted(self, tensors):
        read.extend(tensor.name for tensor in tensors)
        return pieces(self, tensors)

    monkeypatch.setattr(ShardReader, "pieces", counted)
    for span in (range(0, 3), range(3, 8)):
        read.clear()
        decoder = load_decoder(checkpoint, span, **CPU)
        expected = checkpoint_tensors(decoder.config, span)
        assert sorted(read) == sorted(entry.name for entry in expected)
        assert decoder.is_first == (span.start == 0)
        assert decoder.is_last == (span.stop == 8)


def test_a_long_load_says_how_far_it_is(checkpoint):
    shares: list[float] = []
    load_decoder(checkpoint, range(3, 8), **CPU, loaded=shares.append)
    assert len(shares) > 10
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5
    assert shares[-1] == 1.0


def test_ranks_hold_the_same_weights_as_one_rank_would(checkpoint):
    whole = dict(load_whole(checkpoint).named_parameters())
    parts = {}
    for span in (range(0, 3), range(3, 8)):
        parts |= dict(load_decoder(checkpoint, span, **CPU).named_parameters())
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_checkpoint_under_quantos_names_loads_equal(checkpoint, tensors, tmp_path):
    config = check_checkpoint(checkpoint)
    stored = dict(tensors)
    for entry in checkpoint_tensors(config):
        if entry.quantized:
            data, scale = quantize(stored.pop(entry.name))
            stored |= {f"{entry.name}._data": data, f"{entry.name}._scale": scale}
            # quanto's QLinear writes these two as well
            module = entry.name.removesuffix(".weight")
            stored |= {f"{module}.{side}_scale": torch.ones(()) for side in ("input", "output")}
    quantized = rewritten(checkpoint, tmp_path, stored)
    expected = dict(load_whole(checkpoint).named_parameters())
    for name, parameter in load_whole(quantized).named_parameters():
        assert torch.equal(parameter, expected[name]), name
    with pytest.raises(CheckpointError, match="--quantization int8"):
        check_checkpoint(quantized, quantization="none")


@pytest.mark.parametrize("whole", [True, False])
def test_a_missing_tensor_is_named(checkpoint, tensors, tmp_path, whole):
    del tensors[GATE]
    broken = rewritten(checkpoint, tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors: {GATE}"):
        check_checkpoint(broken) if whole else load_decoder(broken, range(4, 8), **CPU)


def test_a_scale_without_data_is_named(checkpoint, tensors, tmp_path):
    name = "language_model.model.layers.0.self_attn.qkv_proj.weight"
    tensors[f"{name}._scale"] = quantize(tensors.pop(name))[1]
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors: {name}._data"):
        check_checkpoint(rewritten(checkpoint, tmp_path, tensors))


def test_a_scale_of_whole_numbers_is_named(checkpoint, tensors, tmp_path):
    name = "language_model.model.layers.0.self_attn.qkv_proj.weight"
    data, scale = quantize(tensors.pop(name))
    tensors |= {f"{name}._data": data, f"{name}._scale": scale.to(torch.int8)}
    with pytest.raises(CheckpointError, match=rf"1 tensors: {name}._scale as torch.int8"):
        check_checkpoint(rewritten(checkpoint, tmp_path, tensors))


def test_a_left_over_tensor_is_named(checkpoint, tensors, tmp_path):
    name = "vision_tower.vision_model.post_layernorm.weight"
    tensors[name] = torch.ones(4)
    with pytest.raises(CheckpointError, match=name):
        check_checkpoint(rewritten(checkpoint, tmp_path, tensors))


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_misshapen_tensor_is_named(checkpoint, tensors, tmp_path, change):
    tensors[GATE] = tensors[GATE].T if change == "shape" else tensors[GATE].to(torch.int8)
    with pytest.raises(CheckpointError, match=f"another shape 1 tensors: {GATE}"):
        check_checkpoint(rewritten(checkpoint, tmp_path, tensors))


def test_a_shard_that_is_missing_cut_or_no_safetensors_is_named(checkpoint, tensors, tmp_path):
    broken = rewritten(checkpoint, tmp_path, tensors)
    shard = broken / "b.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"b\.safetensors has .* bytes"):
        check_checkpoint(broken)
    for junk in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x10" + b"\0" * 30):
        shard.write_bytes(junk)
        with pytest.raises(CheckpointError, match=r"b\.safetensors is no safetensors"):
            check_checkpoint(broken)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing, 1 of . shards"):
        check_checkpoint(broken)


@pytest.mark.parametrize("shard", ["a.safetensors", "b.safetensors"])
def test_a_tensor_that_two_shards_hold_is_named(checkpoint, tensors, tmp_path, shard):
    twice = rewritten(checkpoint, tmp_path, tensors)
    index = json.loads((twice / INDEX).read_text())
    for name in ("a.safetensors", "b.safetensors"):
        save_file(load_file(twice / name) | {GATE: tensors[GATE]}, twice / name)
    index["weight_map"][GATE] = shard
    (twice / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"a\.safetensors and b\.saf.* both hold {GATE}"):
        check_checkpoint(twice)


def test_a_checkpoint_without_an_index_says_what_was_expected(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=INDEX):
        check_checkpoint(tmp_path)


def test_one_file_needs_no_index(checkpoint, tensors, tmp_path):
    single = rewritten(checkpoint, tmp_path, tensors)
    for file in (*single.glob("*.safetensors"), single / INDEX):
        file.unlink()
    save_file(tensors, single / "model.safetensors")
    expected = dict(load_whole(checkpoint).named_parameters())
    for name, parameter in load_whole(single).named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_the_revision_changes_with_the_checkpoint_and_not_with_its_place(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert checkpoint_revision(copy) == checkpoint_revision(checkpoint)
    (copy / "tokenizer_config.json").write_text("{}")
    assert checkpoint_revision(copy) != checkpoint_revision(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "extended")
    (tmp_path / "extended" / "special_tokens_map.json").write_text('{"pad_token": "boat"}')
    assert checkpoint_revision(tmp_path / "extended") != checkpoint_revision(checkpoint)
    other = write_tiny(tmp_path / "other", seed=1)
    assert checkpoint_revision(other) != checkpoint_revision(checkpoint)


@pytest.mark.parametrize("name", [GATE, "language_model.model.embed_tokens.weight"])
def test_a_tensor_with_other_values_in_the_middle_of_a_shard_is_another_revision(
    checkpoint, tensors, tmp_path, name
):
    before = checkpoint_revision(rewritten(checkpoint, tmp_path / "before", tensors))
    tuned = tensors | {name: tensors[name] * 1.5}
    assert checkpoint_revision(rewritten(checkpoint, tmp_path / "tuned", tuned)) != before
