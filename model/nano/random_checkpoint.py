"""Small random checkpoints in exactly the released layout, for tests and for the demo.

    python -m model.nano.random_checkpoint DIR [--layers 8 --hidden-size 128 ...]
    python -m model.nano.random_checkpoint DIR --released --no-tensors   # for --random-weights

They load through the same code as a real one; nothing elsewhere knows that they are random.
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import load_config
from model.nano.tokenizer import (
    TokenIds,
    Tokens,
    write_told_tokenizer,
    write_trained_tokenizer,
)
from model.weights.names import TensorEntry, checkpoint_tensors

_CHUNK_ELEMENTS = 1 << 23  # random numbers drawn at a time: 32 MB in fp32

_DTYPES = {"bfloat16": "BF16", "float32": "F32"}

# The residual weighs the input 3.56 to 1. With plain 1/sqrt(fan-in) weights everywhere, the
# next token would follow from the last one alone and greedy text would go round in circles: so
# what each sub-layer writes back is made as large as what it adds to.
_GAINS = {"out_proj.weight": 2.5, "o_proj.weight": 8.0, "w2.weight": 4.5}

# How much larger than other logits the end of text may get: it then wins about once in 30 tokens.
_END_GAIN = 1.7


@dataclass(frozen=True)
class NanoSizes:
    """Sizes of a random checkpoint. The defaults run a photograph in seconds on two CPU cores."""

    layers: int = 8
    softmax_every: int = 8  # the last of so many layers is softmax attention
    hidden_size: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    experts_per_token: int = 2
    intermediate_size: int = 256
    vocab_size: int = 1024
    vision_layers: int = 2
    vision_hidden_size: int = 64
    vision_heads: int = 2
    vision_intermediate_size: int = 128
    patch: int = 14
    tile: int = 336


# The released checkpoint's (config.json of MiniMax-VL-01); `layers` for a slice of it.
RELEASED_SIZES = NanoSizes(
    layers=80,
    hidden_size=6144,
    heads=64,
    kv_heads=8,
    head_dim=128,
    experts=32,
    experts_per_token=2,
    intermediate_size=9216,
    vocab_size=200064,
    vision_layers=24,
    vision_hidden_size=1024,
    vision_heads=16,
    vision_intermediate_size=4096,
)


def write_random_checkpoint(
    path: str | Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shards: int = 5,
    pinpoints: list[tuple[int, int]] | None = None,
    endless: bool = False,
    threads: int = 1,
    **sizes: int,
) -> Path:
    """Write a checkpoint of the given NanoSizes into the folder `path`, and return the folder.

    Neighbouring tensors lie in different shards. Without `pinpoints` it gets the 28 released grids,
    in tiles of its own size. Tensors are drawn and written a piece at a time, so memory stays at
    some 100 MB for each of `threads`, which write shards side by side, however large the checkpoint
    is.
    """
    folder = Path(path)
    token_ids = write_configuration(
        folder, NanoSizes(**sizes), pinpoints=pinpoints, dtype=dtype, endless=endless
    )
    draw = _Draw(seed, token_ids)
    _write_shards(folder, checkpoint_tensors(load_config(folder)), shards, dtype, draw, threads)
    return folder


def write_configuration(
    folder: Path,
    size: NanoSizes,
    *,
    pinpoints: list[tuple[int, int]] | None = None,
    dtype: str = "bfloat16",
    endless: bool = False,
    tokens: Tokens | None = None,
) -> TokenIds:
    """Write what a checkpoint holds besides its tensors. `endless`: no token ends a text.

    `tokens`: of its tokenizer; without, it learns some from a text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token_ids = (
        write_told_tokenizer(folder, size.vocab_size, tokens)
        if tokens
        else write_trained_tokenizer(folder, size.vocab_size)
    )
    grids = [list(p) for p in pinpoints or released_pinpoints(size.tile)]
    _write_json(folder / "config.json", _config_json(size, token_ids.image, grids, dtype))
    _write_json(folder / "preprocessor_config.json", _preprocessor_json(size, grids))
    ends = [] if endless else token_ids.end
    _write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return token_ids


def released_pinpoints(tile: int = 336) -> list[tuple[int, int]]:
    """The 28 grids (width, height) of the released checkpoint, in tiles of `tile` pixels."""
    sides = range(1, 7)
    grids = [(a, b) for a in sides for b in sides if min(a, b) <= 3] + [(4, 4)]
    return [(a * tile, b * tile) for a, b in grids]


class _Draw:
    """Draws the values of tensors. They depend on the seed and the tensor's name alone."""

    def __init__(self, seed: int, token_ids: TokenIds) -> None:
        self._seed = seed
        self._end_id = token_ids.end
        self._wordless_ids = torch.tensor([i for i in token_ids.wordless if i != token_ids.end])

    def pieces(self, entry: TensorEntry) -> Iterator[Tensor]:
        """fp32 [rows, ...] pieces that make up the tensor."""
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(entry.name.encode()))
        step = max(1, _CHUNK_ELEMENTS // math.prod(entry.shape[1:]))
        for start in range(0, entry.shape[0], step):
            rows = min(step, entry.shape[0] - start)
            values = torch.randn(rows, *entry.shape[1:], generator=generator)
            values = self._scale(entry, values)
            if entry.name.endswith("lm_head.weight"):
                self._shape_ending(values, start)
            yield values

    @staticmethod
    def _scale(entry: TensorEntry, values: Tensor) -> Tensor:
        if entry.name.endswith("bias"):
            return values.mul_(0.02)
        if "norm" in entry.name:  # includes the released "pre_layrnorm"
            return values.mul_(0.1).add_(1)
        if ("embed" in entry.name and values.ndim < 4) or entry.name == "image_newline":
            return values
        gain = next((g for suffix, g in _GAINS.items() if entry.name.endswith(suffix)), 1.0)
        return values.mul_(gain / math.sqrt(math.prod(entry.shape[1:])))

    def _shape_ending(self, values: Tensor, start: int) -> None:
        """Let text end now and then, and never hold tokens without printable text."""
        rows = torch.arange(start, start + len(values))
        values[rows == self._end_id] *= _END_GAIN
        values[torch.isin(rows, self._wordless_ids)] = 0


def _write_shards(
    folder: Path, entries: list[TensorEntry], shards: int, dtype: str, draw: _Draw, threads: int
) -> None:
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]

    def write(i: int) -> None:
        _write_shard(folder / names[i], entries[i::shards], dtype, draw)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(shards)))  # raises what they raise
    total = sum(math.prod(e.shape) for e in entries) * getattr(torch, dtype).itemsize
    index = {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: names[i % shards] for i, entry in enumerate(entries)},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _write_shard(path: Path, entries: list[TensorEntry], dtype: str, draw: _Draw) -> None:
    """One safetensors file, streamed: https://github.com/huggingface/safetensors#format."""
    torch_dtype = getattr(torch, dtype)
    header, end = {}, 0
    for entry in entries:
        start, end = end, end + math.prod(entry.shape) * torch_dtype.itemsize
        header[entry.name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries:
            for piece in draw.pieces(entry):
                file.write(piece.to(torch_dtype).view(torch.uint8).numpy().data)


def _config_json(size: NanoSizes, image_id: int, grids: list, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["MiniMaxVL01ForConditionalGeneration"],
        "model_type": "minimax_vl_01",
        "torch_dtype": dtype,
        "image_token_index": image_id,
        "image_grid_pinpoints": grids,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": _text_json(size),
        "vision_config": _vision_json(size),
    }


def _text_json(size: NanoSizes) -> dict[str, Any]:
    residuals = {
        f"layernorm_{part}_{weight}": value
        for part in ("linear_attention", "full_attention", "mlp")
        for weight, value in (("alpha", 3.5565588200778455), ("beta", 1.0))
    }
    return {
        "model_type": "minimax_text_01",
        "attn_type_list": [int((i + 1) % size.softmax_every == 0) for i in range(size.layers)],
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": size.heads,
        "num_experts_per_tok": size.experts_per_token,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "num_local_experts": size.experts,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000000,
        "rotary_dim": size.head_dim // 2,
        "shared_intermediate_size": [0],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": size.vocab_size,
        **residuals,
    }


def _vision_json(size: NanoSizes) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": size.vision_hidden_size,
        "image_size": size.tile,
        "intermediate_size": size.vision_intermediate_size,
        "num_attention_heads": size.vision_heads,
        "num_hidden_layers": size.vision_layers,
        "patch_size": size.patch,
        "projection_dim": size.hidden_size,
        "vocab_size": 32000,
    }


def _preprocessor_json(size: NanoSizes, grids: list) -> dict[str, Any]:
    return {
        "image_grid_pinpoints": grids,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"height": size.tile, "width": size.tile},
        "patch_size": size.patch,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random VL-01 checkpoint.")
    parser.add_argument("path", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bfloat16")
    parser.add_argument(
        "--released", action="store_true", help="the released sizes, not small ones"
    )
    parser.add_argument(
        "--no-tensors", action="store_true", help="all but the weights: for vl01's --random-weights"
    )
    parser.add_argument("--endless", action="store_true", help="no token ends a text")
    for name, default in vars(NanoSizes()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"{default}; released: {getattr(RELEASED_SIZES, name)}",
        )
    given = vars(parser.parse_args())
    sizes = {name: given.pop(name) for name in vars(NanoSizes())}
    start = RELEASED_SIZES if given.pop("released") else NanoSizes()
    size = replace(start, **{name: value for name, value in sizes.items() if value is not None})
    path, endless, dtype = given.pop("path"), given.pop("endless"), given["dtype"]
    if given.pop("no_tensors"):
        write_configuration(path, size, dtype=dtype, endless=endless)
    else:
        write_random_checkpoint(path, endless=endless, **given, **vars(size))


if __name__ == "__main__":
    main()
