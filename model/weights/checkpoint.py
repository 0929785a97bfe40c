"""Fills a Decoder from a checkpoint: one rank's tensors, streamed, every one accounted for."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.config import VL01Config, load_config
from model.decoder import Decoder
from model.layers.linear import Quantization
from model.weights.names import TensorEntry, checkpoint_tensors
from model.weights.quantization import quantize
from model.weights.shards import INDEX, ShardReader, StoredTensor, stored_tensors
from schemas.errors import CheckpointError

# A piece is read, and quantized, at a time: with the fp32 copies that quantizing makes, a load
# needs some 100 MB beside the weights themselves.
_PIECE_BYTES = 16 << 20

_REVISION_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    INDEX,
)
_REVISION_TENSOR_BYTES = 4096


@dataclass(frozen=True)
class _Source:
    """What a checkpoint holds for one entry: a plain tensor, or int8 data with its scales."""

    entry: TensorEntry
    data: StoredTensor
    scale: StoredTensor | None


def load_decoder(
    checkpoint: str | Path,
    span: range,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization = "int8",
) -> Decoder:
    """The layers in `span`, filled. Reads only their tensors, a piece at a time.

    A plain checkpoint is quantized on the device while it is read; one that is quantized already
    (optimum-quanto's names) is taken as it is.
    Raises CheckpointError, before reading any tensor, as `check_checkpoint` does.
    """
    config = load_config(checkpoint)
    sources = _match(checkpoint, config, span, quantization)
    decoder = Decoder(config, span, dtype=dtype, device=device, quantization=quantization)
    parameters = dict(decoder.named_parameters())
    widest = max(_row_bytes(stored) for source in sources for stored in _stored_in(source))
    reader = ShardReader(max(_PIECE_BYTES, widest), pinned=torch.device(device).type == "cuda")
    # In the order of the files, so that each is read from front to back.
    for source in sorted(sources, key=lambda s: (s.data.path, s.data.offset)):
        _load(source, reader, parameters, quantization)
    return decoder


def check_checkpoint(checkpoint: str | Path, *, quantization: Quantization = "int8") -> VL01Config:
    """Check a whole checkpoint from its index and headers, reading no tensor; return its config.

    Raises CheckpointError naming the tensors that are missing, left over or of another shape,
    and when the checkpoint is quantized but `quantization` is "none".
    """
    config = load_config(checkpoint)
    _match(checkpoint, config, range(config.text.num_layers), quantization)
    return config


def checkpoint_revision(checkpoint: str | Path) -> str:
    """12 hex digits that change with the configuration, the tokenizer, the tensors or their values.

    Of every tensor only some bytes in its middle are read, which is enough to tell a fine-tuned or
    otherwise rewritten checkpoint apart. Raises CheckpointError as `stored_tensors` does.
    """
    root = Path(checkpoint)
    digest = hashlib.sha256()
    for path in (root / name for name in _REVISION_FILES):
        if path.exists():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
    in_order = sorted(stored_tensors(root).values(), key=lambda t: (t.path, t.offset))
    for path, tensors in itertools.groupby(in_order, key=lambda t: t.path):
        with path.open("rb", buffering=0) as file:
            for tensor in tensors:
                size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
                length = min(size, _REVISION_TENSOR_BYTES)
                file.seek(tensor.offset + (size - length) // 2)
                digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
                digest.update(file.read(length))
    return digest.hexdigest()[:12]


def _match(
    checkpoint: str | Path, config: VL01Config, span: range, quantization: Quantization
) -> list[_Source]:
    """What to read for each entry of the span, after checking the whole checkpoint."""
    stored = stored_tensors(checkpoint)
    entries = checkpoint_tensors(config)
    names = {name for entry in entries for name in _names(entry, stored)}
    known = names | {name for entry in entries for name in _unused_names(entry)}
    _refuse(checkpoint, "lacks", [name for name in names if name not in stored])
    _refuse(checkpoint, "has, which VL-01 has not,", [name for name in stored if name not in known])
    sources = {entry.name: _source(entry, stored) for entry in entries}
    _refuse(checkpoint, "holds in another shape", _misshapen(sources.values()))
    quantized = [name for name, source in sources.items() if source.scale is not None]
    if quantization == "none" and quantized:
        _refuse(checkpoint, "holds in int8, so run it with --quantization int8:", quantized)
    return [sources[entry.name] for entry in checkpoint_tensors(config, span)]


def _names(entry: TensorEntry, stored: dict[str, StoredTensor]) -> tuple[str, ...]:
    """The names under which an entry is expected: its own, or the two that quanto writes."""
    quanto = (f"{entry.name}._data", f"{entry.name}._scale")
    is_quanto = entry.quantized and any(name in stored for name in quanto)
    return quanto if is_quanto else (entry.name,)


def _unused_names(entry: TensorEntry) -> tuple[str, ...]:
    """Scales of activations, which quanto writes beside each int8 weight; always 1 there."""
    module = entry.name.removesuffix(".weight")
    return (f"{module}.input_scale", f"{module}.output_scale") if entry.quantized else ()


def _source(entry: TensorEntry, stored: dict[str, StoredTensor]) -> _Source:
    data, *scale = (stored[name] for name in _names(entry, stored))
    return _Source(entry, data, scale[0] if scale else None)


def _misshapen(sources: Iterable[_Source]) -> Iterator[str]:
    for source in sources:
        shapes = [(source.data, source.entry.shape)]
        if source.scale is not None:
            shapes.append((source.scale, (source.entry.shape[0], 1)))
        for stored, expected in shapes:
            if stored.shape != expected:
                yield f"{stored.name} {list(stored.shape)}, expected {list(expected)}"
        if (source.data.dtype == torch.int8) != (source.scale is not None):
            yield f"{source.data.name} as {source.data.dtype}"
        if source.scale is not None and source.scale.dtype == torch.int8:
            yield f"{source.scale.name} as {source.scale.dtype}"


def _refuse(checkpoint: str | Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        raise CheckpointError(f"{checkpoint} {what} {len(names)} tensors: {listed}.")


def _stored_in(source: _Source) -> list[StoredTensor]:
    return [stored for stored in (source.data, source.scale) if stored is not None]


def _row_bytes(stored: StoredTensor) -> int:
    return stored.dtype.itemsize * torch.Size(stored.shape[1:]).numel()


@torch.inference_mode()
def _load(
    source: _Source,
    reader: ShardReader,
    parameters: Mapping[str, Tensor],
    quantization: Quantization,
) -> None:
    entry = source.entry
    target = _rows(parameters[entry.target], entry)
    scales = None
    if entry.quantized and quantization != "none":
        scales = _rows(parameters[f"{entry.target}_scale"], entry)
    for row, piece in reader.pieces(source.data):
        place = slice(row, row + len(piece))
        if scales is not None and source.scale is None:
            target[place], scales[place] = quantize(piece.to(target.device))
        else:
            target[place] = piece.to(target.device)
    if scales is not None and source.scale is not None:
        for row, piece in reader.pieces(source.scale):
            scales[row : row + len(piece)] = piece.to(scales.device)


def _rows(parameter: Tensor, entry: TensorEntry) -> Tensor:
    """The rows of a parameter that an entry fills."""
    stack = parameter if entry.expert is None else parameter[entry.expert]
    return stack[entry.first_row : entry.first_row + entry.shape[0]]
