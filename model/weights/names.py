"""The one table of checkpoint names: what every tensor is called, its shape, and where it goes.

Source: the key list of the released MiniMax-VL-01 checkpoint (8,637 tensors). Knows no files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import TextConfig, VisionConfig, VL01Config

_TEXT = "language_model.model"
_VISION = "vision_tower.vision_model"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the checkpoint.

    `target` is the parameter of the Decoder that holds it, from row `first_row` on (several
    tensors are stacked into one), in the slice `expert` of a stack of experts. `quantized` says
    whether int8 quantization applies to it; its scales then go to `target` + "_scale".
    """

    name: str
    shape: tuple[int, ...]
    target: str
    first_row: int = 0
    expert: int | None = None
    quantized: bool = False


def checkpoint_tensors(config: VL01Config, span: range | None = None) -> list[TensorEntry]:
    """Every tensor that the layers in `span` need; without a span, the whole checkpoint.

    The first layer brings the embeddings and the vision tower along, the last one the head.
    """
    span = range(config.text.num_layers) if span is None else span
    entries: list[TensorEntry] = []
    if 0 in span:
        entries += _embedding(config.text)
        entries += _vision(config)
    for layer in span:
        entries += _layer(config.text, layer)
    if config.text.num_layers - 1 in span:
        entries += _head(config.text)
    return entries


def _embedding(text: TextConfig) -> Iterator[TensorEntry]:
    shape = (text.vocab_size, text.hidden_size)
    yield TensorEntry(f"{_TEXT}.embed_tokens.weight", shape, "embed_tokens.weight")


def _head(text: TextConfig) -> Iterator[TensorEntry]:
    yield TensorEntry(f"{_TEXT}.norm.weight", (text.hidden_size,), "norm.weight")
    shape = (text.vocab_size, text.hidden_size)
    yield TensorEntry("language_model.lm_head.weight", shape, "lm_head.weight")


def _layer(text: TextConfig, layer: int) -> Iterator[TensorEntry]:
    attention = {"lightning": _lightning, "softmax": _softmax}[text.layer_types[layer]]
    for entry in (*_norms(text), *attention(text), *_moe(text)):
        name, target = f"{_TEXT}.layers.{layer}.{entry.name}", f"layers.{layer}.{entry.target}"
        yield replace(entry, name=name, target=target)


def _norms(text: TextConfig) -> Iterator[TensorEntry]:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorEntry(f"{norm}.weight", (text.hidden_size,), f"{norm}.weight")


def _lightning(text: TextConfig) -> Iterator[TensorEntry]:
    hidden, width = text.hidden_size, text.num_heads * text.head_dim
    shapes = {"qkv_proj": (3 * width, hidden), "output_gate": (width, hidden)}
    for linear, shape in (shapes | {"out_proj": (hidden, width)}).items():
        yield TensorEntry(
            f"self_attn.{linear}.weight", shape, f"attention.{linear}.weight", quantized=True
        )
    yield TensorEntry("self_attn.norm.weight", (width,), "attention.norm.weight")


def _softmax(text: TextConfig) -> Iterator[TensorEntry]:
    hidden, width = text.hidden_size, text.num_heads * text.head_dim
    kv_width = text.num_kv_heads * text.head_dim
    rows = {"q": (0, width), "k": (width, kv_width), "v": (width + kv_width, kv_width)}
    for part, (first_row, height) in rows.items():
        yield TensorEntry(
            f"self_attn.{part}_proj.weight",
            (height, hidden),
            "attention.qkv_proj.weight",
            first_row,
            quantized=True,
        )
    yield TensorEntry(
        "self_attn.o_proj.weight", (hidden, width), "attention.out_proj.weight", quantized=True
    )


def _moe(text: TextConfig) -> Iterator[TensorEntry]:
    hidden, inner = text.hidden_size, text.intermediate_size
    # The gate is never quantized: in int8 it changes 2% of the routings.
    yield TensorEntry("block_sparse_moe.gate.weight", (text.num_experts, hidden), "moe.gate.weight")
    places = {
        "w1": ((inner, hidden), "moe.w13", 0),
        "w3": ((inner, hidden), "moe.w13", inner),
        "w2": ((hidden, inner), "moe.w2", 0),
    }
    for expert in range(text.num_experts):
        for part, (shape, target, first_row) in places.items():
            name = f"block_sparse_moe.experts.{expert}.{part}.weight"
            yield TensorEntry(name, shape, target, first_row, expert, quantized=True)


def _vision(config: VL01Config) -> Iterator[TensorEntry]:
    vision, hidden = config.vision, config.text.hidden_size
    width = vision.hidden_size
    yield from _vision_embeddings(vision)
    for layer in range(vision.num_layers):
        yield from _vision_layer(vision, layer)
    shapes = {"linear_1": (hidden, width), "linear_2": (hidden, hidden)}
    for linear, shape in shapes.items():
        name = f"multi_modal_projector.{linear}"
        yield TensorEntry(f"{name}.weight", shape, f"projector.{linear}.weight")
        yield TensorEntry(f"{name}.bias", shape[:1], f"projector.{linear}.bias")
    yield TensorEntry("image_newline", (hidden,), "image_newline")


def _vision_embeddings(vision: VisionConfig) -> Iterator[TensorEntry]:
    width, patch = vision.hidden_size, vision.patch_size
    shapes = {
        "class_embedding": (width,),
        "patch_embedding.weight": (width, 3, patch, patch),
        "position_embedding.weight": (vision.patches_per_side**2 + 1, width),
    }
    for part, shape in shapes.items():
        target = f"vision_tower.{part.removesuffix('.weight')}"
        yield TensorEntry(f"{_VISION}.embeddings.{part}", shape, target)
    for part in ("weight", "bias"):  # the released name is misspelt
        yield TensorEntry(f"{_VISION}.pre_layrnorm.{part}", (width,), f"vision_tower.norm.{part}")


def _vision_layer(vision: VisionConfig, layer: int) -> Iterator[TensorEntry]:
    width, inner = vision.hidden_size, vision.intermediate_size
    source, target = f"{_VISION}.encoder.layers.{layer}", f"vision_tower.layers.{layer}"
    for norm in ("layer_norm1", "layer_norm2"):
        for part in ("weight", "bias"):
            yield TensorEntry(f"{source}.{norm}.{part}", (width,), f"{target}.{norm}.{part}")
    linears = {
        "self_attn.q_proj": ((width, width), "qkv_proj", 0),
        "self_attn.k_proj": ((width, width), "qkv_proj", width),
        "self_attn.v_proj": ((width, width), "qkv_proj", 2 * width),
        "self_attn.out_proj": ((width, width), "out_proj", 0),
        "mlp.fc1": ((inner, width), "fc1", 0),
        "mlp.fc2": ((width, inner), "fc2", 0),
    }
    for linear, (shape, place, row) in linears.items():
        yield TensorEntry(f"{source}.{linear}.weight", shape, f"{target}.{place}.weight", row)
        yield TensorEntry(f"{source}.{linear}.bias", shape[:1], f"{target}.{place}.bias", row)
