"""What a checkpoint says about itself: sizes, constants and image settings, read and checked.

Owns the JSON files of a checkpoint; knows nothing of tensors, so it may be read on any machine.
"""

from dataclasses import dataclass
from typing import Literal

from model.files import Checkpoint, Folder
from model.json_section import Section
from schemas.errors import CheckpointError

CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

LayerType = Literal["lightning", "softmax"]

_LAYER_TYPE_NAMES: dict[object, LayerType] = {
    0: "lightning",
    1: "softmax",
    "linear_attention": "lightning",
    "full_attention": "softmax",
}


@dataclass(frozen=True)
class Residual:
    """The weights of a residual connection: alpha * x + beta * f(x)."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class TextConfig:
    """Sizes and constants of the text backbone. `layer_types[i]` belongs to global layer i.

    `max_position_embeddings` is not read: rotary angles are computed for any position, and the
    released value is said to be 8,192, which an A4 page and its answer exceed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    num_experts: int
    experts_per_token: int
    rms_norm_eps: float
    layer_types: tuple[LayerType, ...]
    lightning_residual: Residual
    softmax_residual: Residual
    moe_residual: Residual


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the CLIP vision tower. `image_size` is the side of a tile in pixels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int
    layer_norm_eps: float

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class VL01Config:
    """Everything a checkpoint says about itself. `pinpoints` are (width, height) in pixels."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    pinpoints: tuple[tuple[int, int], ...]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


def check_tokenizer_files(folder: Folder) -> None:
    """That there are a tokenizer and a chat template, as far as the names of files tell. Raises
    CheckpointError."""
    files = folder.files()
    if "tokenizer.json" not in files:
        raise CheckpointError(
            f"{folder} has no tokenizer.json; copy it there from where the checkpoint is from."
        )
    if not files.keys() & {"tokenizer_config.json", "chat_template.jinja"}:
        raise no_chat_template(folder)


def no_chat_template(folder: Folder) -> CheckpointError:
    return CheckpointError(
        f"{folder} has no chat template; expected `chat_template` in tokenizer_config.json or a"
        " file chat_template.jinja."
    )


def load_config(checkpoint: Checkpoint) -> VL01Config:
    """Read config.json, preprocessor_config.json and generation_config.json of a checkpoint.

    Both the released field names and transformers' own names for them are understood.
    Raises CheckpointError when a file is missing or damaged, when the checkpoint is not VL-01,
    and when it asks for something this implementation does not compute.
    """
    root = Folder.at(checkpoint)
    config = Section.of(root, "config.json")
    if config.get("model_type") != "minimax_vl_01":
        raise CheckpointError(
            f"{config.path} says model_type {config.get('model_type')!r}; expected 'minimax_vl_01'."
            " Point --model at a MiniMax-VL-01 checkpoint."
        )
    config.expect("vision_feature_layer", -1)
    config.expect("vision_feature_select_strategy", "default")
    config.expect("projector_hidden_act", "gelu")
    text = _text_config(config.section("text_config"))
    vision = _vision_config(config.section("vision_config"))
    image_token_id = config.need("image_token_index", "image_token_id")
    if image_token_id not in range(text.vocab_size):
        raise CheckpointError(
            f"{config.path} does not fit together: image token {image_token_id} in a vocabulary "
            f"of {text.vocab_size}."
        )
    preprocessor = Section.of(root, "preprocessor_config.json")
    return VL01Config(
        text=text,
        vision=vision,
        image_token_id=image_token_id,
        eos_token_ids=_eos_token_ids(root, config),
        pinpoints=_pinpoints(config, preprocessor, vision.image_size),
        image_mean=tuple(preprocessor.need("image_mean")),
        image_std=tuple(preprocessor.need("image_std")),
    )


def _text_config(text: Section) -> TextConfig:
    text.expect("hidden_act", "silu")
    text.expect("postnorm", True)
    text.expect("tie_word_embeddings", False)
    text.expect("sliding_window", None)
    text.expect("rope_scaling", None)
    if any(text.get("shared_intermediate_size", default=[])):
        raise CheckpointError(f"{text.path} has shared experts; this program computes none.")
    num_layers, num_heads = text.need("num_hidden_layers"), text.need("num_attention_heads")
    head_dim = text.get("head_dim", default=text.need("hidden_size") // num_heads)
    rope = text.section("rope_parameters", optional=True)
    rope.expect("rope_type", "default")
    theta = rope.get("rope_theta", default=text.get("rope_theta"))
    rotary_factor = rope.get(
        "partial_rotary_factor", default=text.get("partial_rotary_factor", default=1)
    )
    config = TextConfig(
        vocab_size=text.need("vocab_size"),
        hidden_size=text.need("hidden_size"),
        intermediate_size=text.need("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=text.need("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=text.get("rotary_dim", default=int(head_dim * rotary_factor)),
        rope_theta=float(text.need("rope_theta") if theta is None else theta),
        num_experts=text.need("num_local_experts", "num_experts"),
        experts_per_token=text.need("num_experts_per_tok"),
        rms_norm_eps=text.get("rms_norm_eps", default=1e-5),
        layer_types=_layer_types(text, num_layers),
        lightning_residual=_residual(text, "linear_attention", "linear_attn"),
        softmax_residual=_residual(text, "full_attention", "full_attn"),
        moe_residual=_residual(text, "mlp", "mlp"),
    )
    _check_text(config, text.path)
    return config


def _layer_types(text: Section, num_layers: int) -> tuple[LayerType, ...]:
    names = text.need("attn_type_list", "layer_types")
    unknown = [name for name in names if name not in _LAYER_TYPE_NAMES]
    if unknown or len(names) != num_layers:
        raise CheckpointError(
            f"{text.path} lists {len(names)} attention types for {num_layers} layers"
            + (f", among them {unknown[0]!r}" if unknown else "")
            + "; expected one for each layer, 0 (lightning) or 1 (softmax)."
        )
    return tuple(_LAYER_TYPE_NAMES[name] for name in names)


def _residual(text: Section, released: str, transformers: str) -> Residual:
    return Residual(
        text.need(f"layernorm_{released}_alpha", f"{transformers}_alpha_factor"),
        text.need(f"layernorm_{released}_beta", f"{transformers}_beta_factor"),
    )


def _check_text(config: TextConfig, where: str) -> None:
    problems = {
        f"{config.num_heads} heads over {config.num_kv_heads} key/value heads": (
            config.num_heads % config.num_kv_heads
        ),
        f"rotary_dim {config.rotary_dim} in head_dim {config.head_dim}": (
            config.rotary_dim % 2 or config.rotary_dim > config.head_dim
        ),
        f"{config.experts_per_token} experts per token of {config.num_experts}": (
            config.experts_per_token > config.num_experts
        ),
    }
    for problem, found in problems.items():
        if found:
            raise CheckpointError(f"{where} does not fit together: {problem}.")


def _vision_config(vision: Section) -> VisionConfig:
    # transformers leaves `hidden_act` out when it is quick_gelu, CLIP's own default: so it is
    # required here, where only the released gelu is computed.
    vision.need("hidden_act")
    vision.expect("hidden_act", "gelu")
    config = VisionConfig(
        hidden_size=vision.need("hidden_size"),
        intermediate_size=vision.need("intermediate_size"),
        num_layers=vision.need("num_hidden_layers"),
        num_heads=vision.need("num_attention_heads"),
        patch_size=vision.need("patch_size"),
        image_size=vision.need("image_size"),
        layer_norm_eps=vision.get("layer_norm_eps", default=1e-5),
    )
    if config.image_size % config.patch_size:
        raise CheckpointError(
            f"{vision.path}: image_size {config.image_size} is no multiple of "
            f"patch_size {config.patch_size}."
        )
    return config


def _eos_token_ids(root: Folder, config: Section) -> tuple[int, ...]:
    name, ids = "generation_config.json", None
    if root.exists(name):
        ids = Section.of(root, name).get("eos_token_id")
    if ids is None:
        ids = config.section("text_config").need("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _pinpoints(config: Section, preprocessor: Section, tile: int) -> tuple[tuple[int, int], ...]:
    pinpoints = preprocessor.get("image_grid_pinpoints")
    in_config = config.get("image_grid_pinpoints")
    if not pinpoints and not in_config:
        raise CheckpointError(f"{preprocessor.path} lacks image_grid_pinpoints.")
    pinpoints = [tuple(p) for p in pinpoints or in_config]
    if in_config is not None and {tuple(p) for p in in_config} != set(pinpoints):
        raise CheckpointError(
            f"image_grid_pinpoints disagree: {len(pinpoints)} in {preprocessor.path}, "
            f"{len(in_config)} in {config.path}. Copy one list into both files."
        )
    for pinpoint in pinpoints:
        if len(pinpoint) != 2 or any(side <= 0 or side % tile for side in pinpoint):
            raise CheckpointError(
                f"{preprocessor.path}: pinpoint {list(pinpoint)} is no grid of {tile} px tiles."
            )
    return tuple(pinpoints)
