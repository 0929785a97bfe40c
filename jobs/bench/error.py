"""How far quantized layers are from the bf16 ones they were made of. Prints nothing.

Layer by layer, for the whole in bf16 is too large for a GPU of 80 GB. T tokens, D hidden size.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.bench.slice import WIDTHS
from model.config import VL01Config, load_config
from model.decoder import Decoder
from model.engine.config import EngineConfig
from model.layers.linear import Quantization
from model.layers.memory import LayerMemory
from model.layers.ragged import BLOCK_TOKENS, RaggedBatch
from model.nano.random_checkpoint import write_configuration
from model.weights.quantization import quantize
from model.weights.random import random_decoder
from schemas.errors import ConfigError

MODES: tuple[Quantization, ...] = ("int8", "int8-dynamic")
TOKENS = 8192  # of one prompt: enough for the kernels of prompts
COMPARED = 1024  # of them, the last, whose logits are compared


@dataclass(frozen=True)
class ModeError:
    """layers: |y - y_bf16| / |y_bf16| of each layer, given what the layer before it gave in bf16.
    logits: the same of the logits, after all layers in this mode; the bf16 rounding of both is in
    it. greedy: the share of tokens whose likeliest next token is the same."""

    mode: str
    layers: tuple[float, ...]
    logits: float
    greedy: float


@torch.inference_mode()
def measure_errors(
    layers: int = 8, width: str = "released", device: str = "auto", tokens: int = TOKENS
) -> list[ModeError]:
    """Random weights, one prompt of random tokens.

    Raises ConfigError when there is no GPU for the released width.
    """
    with tempfile.TemporaryDirectory(prefix="vl01-bench-") as folder:
        write_configuration(Path(folder), replace(WIDTHS[width], layers=layers), endless=True)
        config = load_config(folder)
        engine = EngineConfig(folder, device=device)  # type: ignore[arg-type]
    if width == "released" and not engine.on_cuda:
        raise ConfigError(
            "the released width takes a GPU, and this machine has none; --width tiny tries the "
            "command on a CPU"
        )
    where = {"dtype": engine.torch_dtype, "device": engine.rank_device(0)}
    return _Comparison(config, tokens, where).errors()


class _Comparison:
    def __init__(self, config: VL01Config, tokens: int, where: dict[str, Any]) -> None:
        self._config, self._where = config, where
        self._blocks = list(range(-(-tokens // BLOCK_TOKENS)))
        self._batch = RaggedBatch.build([tokens], [0], [0], [self._blocks], where["device"])
        self._hidden_TD = torch.zeros(0)
        self._in_mode = dict.fromkeys(MODES, self._hidden_TD)
        self._layers: dict[Quantization, list[float]] = {mode: [] for mode in MODES}

    def errors(self) -> list[ModeError]:
        last = None
        for layer in range(self._config.text.num_layers):
            last = self._compare_layer(range(layer, layer + 1))
        assert last is not None
        exact = last.logits(self._hidden_TD[-COMPARED:]).nan_to_num_(neginf=0)
        found = []
        for mode in MODES:
            logits = last.logits(self._in_mode[mode][-COMPARED:]).nan_to_num_(neginf=0)
            greedy = (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
            found.append(ModeError(mode, tuple(self._layers[mode]), _error(logits, exact), greedy))
        return found

    def _compare_layer(self, span: range) -> Decoder:
        plain = random_decoder(
            self._config, span, quantization="none", seed=span.start, **self._where
        )
        if plain.is_first:
            vocabulary = self._config.image_token_id
            ids_T = torch.arange(len(self._batch.positions_T)) * 7919 % vocabulary
            self._hidden_TD = plain.embed(ids_T.to(self._where["device"]))
            self._in_mode = dict.fromkeys(MODES, self._hidden_TD)
        given_TD = self._hidden_TD
        self._hidden_TD = self._run(plain, given_TD)
        for mode in MODES:
            quantized = _quantized(plain, mode, self._where)
            alone_TD = self._run(quantized, given_TD)
            self._layers[mode].append(_error(alone_TD, self._hidden_TD))
            self._in_mode[mode] = self._run(quantized, self._in_mode[mode])
        return plain

    def _run(self, decoder: Decoder, hidden_TD: Tensor) -> Tensor:
        memory = LayerMemory(
            self._config.text, decoder.span, slots=1, blocks=len(self._blocks), **self._where
        )
        return decoder(hidden_TD, self._batch, memory)


def _quantized(plain: Decoder, mode: Quantization, where: dict[str, Any]) -> Decoder:
    """The same layers in `mode`; a matrix of the stack at a time, for it takes an fp32 copy."""
    quantized = Decoder(plain.config, plain.span, quantization=mode, **where)
    targets = dict(quantized.named_parameters())
    for name, weight in plain.named_parameters():
        if (scale := targets.get(f"{name}_scale")) is None:
            targets[name].copy_(weight)
            continue
        shape = (-1, *weight.shape[-2:])
        stacks = weight.view(shape), targets[name].view(shape), scale.view(*shape[:2], 1)
        for matrix, data, scales in zip(*stacks, strict=True):
            levels, steps = quantize(matrix)
            data.copy_(levels)
            scales.copy_(steps)
    return quantized


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found.float() - expected.float()).norm()
    return (difference / expected.float().norm()).item()
