"""Fills a Decoder from a checkpoint: one rank's tensors, streamed, every one accounted for."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import VL01Config, load_config
from model.decoder import Decoder
from model.files import Checkpoint, Folder
from model.layers.linear import Quantization
from model.weights.names import TensorEntry, checkpoint_tensors
from model.weights.quantization import quantize
from model.weights.reader import ShardReader
from model.weights.shards import StoredTensor, stored_tensors
from schemas.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """What a checkpoint holds for one entry: a plain tensor, or int8 data with its scales."""

    entry: TensorEntry
    data: StoredTensor
    scale: StoredTensor | None


@dataclass(frozen=True)
class _Place:
    """Where the rows of a stored tensor go. With `scales` they are quantized on the way."""

    rows: Tensor
    scales: Tensor | None = None

    def fill(self, first_row: int, piece: Tensor) -> None:
        place = slice(first_row, first_row + len(piece))
        piece = piece.to(self.rows.device)
        if self.scales is None:
            self.rows[place] = piece
        else:
            self.rows[place], self.scales[place] = quantize(piece)


def load_decoder(
    checkpoint: Checkpoint,
    span: range,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization = "int8",
    loaded: Callable[[float], None] = lambda _: None,
) -> Decoder:
    """The layers in `span`, filled. Reads only their tensors, ranges of them in parallel.

    loaded: is told the share of their bytes that is there, again and again.
    A plain checkpoint is quantized on the device while it is read; one that is quantized already
    (optimum-quanto's names) is taken as it is.
    Raises CheckpointError, before reading any tensor, as `check_checkpoint` does; then that and
    EngineError as `ShardReader.pieces` does.
    """
    started = time.monotonic()
    folder = Folder.at(checkpoint)
    config = load_config(folder)
    sources = _match(folder, config, span, quantization)
    decoder = Decoder(config, span, dtype=dtype, device=device, quantization=quantization)
    places = _places(sources, dict(decoder.named_parameters()), quantization)
    reader = ShardReader(folder, pinned=torch.device(device).type == "cuda")
    stored = [tensor for source in sources for tensor in _stored_in(source)]
    all_bytes, filled = sum(tensor.nbytes for tensor in stored), 0
    with torch.inference_mode():
        for piece, rows in reader.pieces(stored):
            places[piece.tensor.name].fill(piece.first_row, rows)
            filled += piece.nbytes
            loaded(filled / all_bytes)
    seconds, gigabytes = time.monotonic() - started, reader.bytes_read / 1e9
    logger.info(
        "layers %d to %d of %s: read %.2f GB in %.1f s, %.2f GB/s",
        *(span.start, span.stop - 1, folder, gigabytes, seconds, gigabytes / seconds),
    )
    return decoder


def check_checkpoint(checkpoint: Checkpoint, *, quantization: Quantization = "int8") -> VL01Config:
    """Check a whole checkpoint from its index and headers, reading no tensor; return its config.

    Raises CheckpointError naming the tensors that are missing, left over or of another shape,
    and when the checkpoint is quantized but `quantization` is "none".
    """
    folder = Folder.at(checkpoint)
    config = load_config(folder)
    _match(folder, config, range(config.text.num_layers), quantization)
    return config


def _match(
    checkpoint: Folder, config: VL01Config, span: range, quantization: Quantization
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


def _refuse(checkpoint: Folder, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        raise CheckpointError(f"{checkpoint} {what} {len(names)} tensors: {listed}.")


def _stored_in(source: _Source) -> list[StoredTensor]:
    return [stored for stored in (source.data, source.scale) if stored is not None]


def _places(
    sources: Iterable[_Source], parameters: Mapping[str, Tensor], quantization: Quantization
) -> dict[str, _Place]:
    """By the names of the stored tensors."""
    places = {}
    for source in sources:
        entry = source.entry
        rows, scales = _rows(parameters[entry.target], entry), None
        if entry.quantized and quantization != "none":
            scales = _rows(parameters[f"{entry.target}_scale"], entry)
        if source.scale is None:
            places[source.data.name] = _Place(rows, scales)
        else:
            assert scales is not None  # _match has refused it
            places[source.data.name] = _Place(rows)
            places[source.scale.name] = _Place(scales)
    return places


def _rows(parameter: Tensor, entry: TensorEntry) -> Tensor:
    """The rows of a parameter that an entry fills."""
    stack = parameter if entry.expert is None else parameter[entry.expert]
    return stack[entry.first_row : entry.first_row + entry.shape[0]]
