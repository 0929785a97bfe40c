"""A Decoder's weights as a checkpoint in the released layout: shards, index, configuration."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import load_config
from model.decoder import Decoder
from model.nano.random_checkpoint import NanoSizes
from model.nano.sizes import NANO, write_nano_configuration
from model.weights.names import TensorEntry, checkpoint_tensors


def export(decoder: Decoder, folder: Path, *, size: NanoSizes = NANO, shards: int = 3) -> None:
    """Write the whole checkpoint in bf16. Neighbouring tensors lie in different shards."""
    write_nano_configuration(folder, size)
    entries = checkpoint_tensors(load_config(folder))
    weights = decoder.state_dict()
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        tensors = {entry.name: _tensor(weights, entry) for entry in entries[i::shards]}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(2 * _tensor(weights, e).numel() for e in entries)},
        "weight_map": {entry.name: names[i % shards] for i, entry in enumerate(entries)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _tensor(weights: dict[str, Tensor], entry: TensorEntry) -> Tensor:
    """The rows of the parameter that hold the tensor, as `load_decoder` puts them there."""
    target = weights[entry.target]
    if entry.expert is not None:
        target = target[entry.expert]
    rows = target[entry.first_row : entry.first_row + entry.shape[0]]
    return rows.detach().to("cpu", torch.bfloat16).contiguous()
