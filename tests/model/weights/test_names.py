"""The table of names against the key list of the released checkpoint, as its facts are known."""

import dataclasses
from collections import Counter

import pytest

from model.config import load_config
from model.weights.names import checkpoint_tensors


@pytest.fixture(scope="module")
def released(checkpoint):
    """The tiny configuration blown up to the released counts."""
    tiny = load_config(checkpoint)
    types = tuple("softmax" if (i + 1) % 8 == 0 else "lightning" for i in range(80))
    text = dataclasses.replace(
        tiny.text,
        num_layers=80,
        layer_types=types,
        num_experts=32,
        hidden_size=6144,
        intermediate_size=9216,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=200064,
    )
    vision = dataclasses.replace(
        tiny.vision,
        num_layers=24,
        hidden_size=1024,
        intermediate_size=4096,
        image_size=336,
    )
    return dataclasses.replace(tiny, text=text, vision=vision)


def test_the_released_checkpoint_has_8637_tensors_and_456_billion_parameters(released):
    entries = checkpoint_tensors(released)
    assert len({entry.name for entry in entries}) == len(entries) == 8637
    text = [entry for entry in entries if entry.name.startswith("language_model.")]
    assert round(sum(_size(entry.shape) for entry in text) / 1e9, 1) == 456.1
    experts = sum(_size(entry.shape) for entry in entries if entry.expert is not None)
    assert round(experts / 1e9, 1) == 434.9


def test_names_are_the_released_ones(released):
    by_name = {entry.name: entry for entry in checkpoint_tensors(released)}
    layer = "language_model.model.layers.3"
    expected = {
        "language_model.model.embed_tokens.weight": (200064, 6144),
        "language_model.model.norm.weight": (6144,),
        "language_model.lm_head.weight": (200064, 6144),
        f"{layer}.input_layernorm.weight": (6144,),
        f"{layer}.post_attention_layernorm.weight": (6144,),
        f"{layer}.block_sparse_moe.gate.weight": (32, 6144),
        f"{layer}.block_sparse_moe.experts.31.w1.weight": (9216, 6144),
        f"{layer}.block_sparse_moe.experts.31.w3.weight": (9216, 6144),
        f"{layer}.block_sparse_moe.experts.31.w2.weight": (6144, 9216),
        f"{layer}.self_attn.qkv_proj.weight": (24576, 6144),
        f"{layer}.self_attn.output_gate.weight": (8192, 6144),
        f"{layer}.self_attn.norm.weight": (8192,),
        f"{layer}.self_attn.out_proj.weight": (6144, 8192),
        "language_model.model.layers.7.self_attn.q_proj.weight": (8192, 6144),
        "language_model.model.layers.7.self_attn.k_proj.weight": (1024, 6144),
        "language_model.model.layers.7.self_attn.v_proj.weight": (1024, 6144),
        "language_model.model.layers.7.self_attn.o_proj.weight": (6144, 8192),
        "vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
        "vision_tower.vision_model.pre_layrnorm.bias": (1024,),
        "vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.bias": (1024,),
        "vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
        "multi_modal_projector.linear_1.weight": (6144, 1024),
        "multi_modal_projector.linear_2.bias": (6144,),
        "image_newline": (6144,),
    }
    assert {name: by_name[name].shape for name in expected} == expected
    assert not any("post_layernorm" in name and "vision" in name for name in by_name)


def test_only_projections_and_experts_of_the_text_layers_are_quantized(released):
    kinds = Counter(
        entry.name.split(".")[-2] for entry in checkpoint_tensors(released) if entry.quantized
    )
    lightning = {"qkv_proj": 70, "output_gate": 70, "out_proj": 70}
    softmax = {"q_proj": 10, "k_proj": 10, "v_proj": 10, "o_proj": 10}
    experts = {"w1": 80 * 32, "w2": 80 * 32, "w3": 80 * 32}
    assert kinds == lightning | softmax | experts


def test_spans_share_out_every_tensor_once(released):
    spans = [range(0, 27), range(27, 53), range(53, 80)]
    parts = [entry.name for span in spans for entry in checkpoint_tensors(released, span)]
    assert sorted(parts) == sorted(entry.name for entry in checkpoint_tensors(released))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
