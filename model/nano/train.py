"""Trains the small checkpoint, in sittings: each goes on from what the last one left.

    python -m model.nano.train STATE [--seconds 500] [--decay 200] [--export DIR]

STATE is a folder: the weights and the optimizer's memory in files of less than 16 MiB, and the
curve. A sitting ends after so many seconds, and on a GPU takes all of its cores to draw pages.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from model.config import load_config
from model.decoder import Decoder
from model.layers.dispatch import plain_layers
from model.nano.batches import Batch, Batches, Plan
from model.nano.export import export
from model.nano.losses import Heads, Losses, Weights
from model.nano.optimizer import Optimizer
from model.nano.random_checkpoint import NanoSizes
from model.nano.sizes import NANO, write_nano_configuration
from model.nano.tasks import prompts
from model.tokenizer import Tokenizer

_PIECE_BYTES = 15 << 20
_WARM_UP = 100  # batches over which the learning rate rises


@dataclass(frozen=True)
class Settings:
    """seconds: of this sitting. decay: seconds at its end over which the learning rate falls to
    0; without, it stays, and another sitting can go on from there."""

    state: Path
    seconds: float
    decay: float = 0.0
    device: str = "cuda"
    compiled: bool = False
    workers: int = 15
    tokens: int = 64_000
    seed: int = 0
    size: NanoSizes = NANO
    weights: Weights = field(default_factory=Weights)
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    most_batches: int | None = None
    easy: int = 300
    log_every: int = 20


class Training:
    """The model, its optimizer and the number of the next batch."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        on_cuda = settings.device == "cuda"
        where = {
            "dtype": torch.bfloat16 if on_cuda else torch.float32,
            "device": settings.device,
        }
        self.configuration = settings.state / "configuration"
        write_nano_configuration(self.configuration, settings.size)
        config = load_config(self.configuration)
        self.decoder = Decoder(config, range(config.text.num_layers), **where, quantization="none")
        side = 2 * config.vision.patches_per_side
        self.heads = Heads(config.text.hidden_size, side, **where)
        for module in (self.decoder, self.heads):
            initialise(module)
            module.requires_grad_()
        self.number = 0
        self.optimizer = Optimizer(
            self._named(), matrix_rate=settings.matrix_rate, other_rate=settings.other_rate
        )
        if (settings.state / "progress.json").exists():
            self._load()

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.decoder.named_parameters()
        yield from self.heads.named_parameters(prefix="heads")

    def losses(self) -> Losses:
        template = self.templates["read"]
        compiled = self.settings.compiled
        return Losses(self.decoder, self.heads, template, self.settings.weights, compiled=compiled)

    @property
    def templates(self) -> dict:
        tokenizer = Tokenizer.from_checkpoint(self.configuration)
        return {task: tokenizer.prompt_template(text) for task, text in prompts().items()}

    def batches(self) -> DataLoader:
        settings = self.settings
        dataset = Batches(
            Plan(settings.tokens, easy=settings.easy),
            self.configuration / "tokenizer.json",
            self.templates,
            self.decoder.config.pinpoints,
            start=self.number,
        )
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=settings.workers,
            prefetch_factor=2 if settings.workers else None,
            pin_memory=settings.device == "cuda",
        )

    def save(self) -> None:
        """In pieces, each a safetensors file of its own."""
        state = self.settings.state
        for old in state.glob("state-*.safetensors"):
            old.unlink()
        piece: dict[str, torch.Tensor] = {}
        count = 0
        flat = {
            f"{name}/{kind}": value.cpu().contiguous()
            for name, kinds in self.optimizer.state_dict().items()
            for kind, value in kinds.items()
        }
        for key, value in flat.items():
            size = sum(v.nbytes for v in piece.values())
            if piece and size + value.nbytes > _PIECE_BYTES:
                save_file(piece, state / f"state-{count}.safetensors")
                piece, count = {}, count + 1
            piece[key] = value
        save_file(piece, state / f"state-{count}.safetensors")
        (state / "progress.json").write_text(json.dumps({"batches": self.number}))

    def _load(self) -> None:
        state: dict[str, dict[str, torch.Tensor]] = {}
        for path in sorted(self.settings.state.glob("state-*.safetensors")):
            for key, value in load_file(path, device=self.settings.device).items():
                name, kind = key.rsplit("/", 1)
                state.setdefault(name, {})[kind] = value
        self.optimizer.load_state_dict(state)
        progress = json.loads((self.settings.state / "progress.json").read_text())
        self.number = progress["batches"]


def initialise(module: nn.Module) -> None:
    """Rows of about unit gain; norms 1, biases 0; positions of a tile as waves of its axes."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            elif name.endswith("position_embedding"):
                parameter.copy_(_waves(*parameter.shape))
            elif "embed_tokens" in name or parameter.ndim == 1:
                parameter.normal_()
            else:
                fan_in = parameter.shape[-1] if parameter.ndim < 4 else parameter[0].numel()
                gain = 0.1 if "lm_head" in name or "heads" in name or "moe.gate" in name else 1.0
                parameter.normal_(std=gain / math.sqrt(fan_in))


def _waves(tokens: int, width: int) -> torch.Tensor:
    """[1 + side * side, width]: sines and cosines of row and column, none for the class token."""
    side = math.isqrt(tokens - 1)
    frequencies = 0.5 ** torch.arange(0, 6, 24 / width)[: width // 4]
    angles = torch.arange(side)[:, None] * frequencies * math.pi / 2
    waves = 0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows = waves[:, None].expand(side, side, -1)
    both = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
    return nn.functional.pad(both, (0, width - both.shape[1], 1, 0))


def train(settings: Settings) -> Training:
    """One sitting. Appends to STATE/curve.jsonl, saves STATE at the end."""
    begin = time.monotonic()
    torch.set_float32_matmul_precision("high")
    training = Training(settings)
    losses = training.losses()
    rows = Log(settings.state / "curve.jsonl", settings.log_every)
    batches = iter(training.batches())
    first = training.number
    with plain_layers():
        while not _is_over(settings, training.number - first, time.monotonic() - begin):
            batch: Batch = next(batches).to(settings.device)
            found = losses(batch)
            found["loss"].backward()
            left = settings.seconds - (time.monotonic() - begin)
            fall = min(1.0, max(0.0, left) / settings.decay) if settings.decay else 1.0
            training.optimizer.step(min(1.0, (training.number + 1) / _WARM_UP) * fall)
            training.number += 1
            rows.add(training.number, batch, found, fall)
    training.save()
    return training


def _is_over(settings: Settings, batches: int, seconds: float) -> bool:
    if settings.most_batches is not None and batches >= settings.most_batches:
        return True
    return seconds >= settings.seconds


class Log:
    """The mean losses of every so many batches, one JSON object a line."""

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every
        self._sums: dict[str, torch.Tensor] = {}
        self._batches = self._pages = self._tokens = 0
        self._since = time.monotonic()

    def add(self, number: int, batch: Batch, found: dict[str, torch.Tensor], rate: float) -> None:
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._batches += 1
        self._pages += len(batch.tiles)
        self._tokens += batch.tokens
        if self._batches == self._every:
            self._write(number, rate)

    def _write(self, number: int, rate: float) -> None:
        means = {name: round(float(v) / self._batches, 4) for name, v in self._sums.items()}
        seconds = time.monotonic() - self._since
        row = {
            "batch": number,
            "rate": round(rate, 3),
            **means,
            "pages_per_second": round(self._pages / seconds, 1),
            "tokens_per_second": round(self._tokens / seconds),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        self._sums, self._batches, self._pages, self._tokens = {}, 0, 0, 0
        self._since = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small VL-01 checkpoint.")
    parser.add_argument("state", type=Path, help="folder of the state, made if there is none")
    parser.add_argument("--seconds", type=float, default=500, help="length of this sitting")
    parser.add_argument(
        "--decay", type=float, default=0, help="seconds of falling rate, at its end"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--tokens", type=int, default=64_000, help="of the images in a batch")
    parser.add_argument("--compiled", action="store_true", help="through torch.compile")
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--other-rate", type=float, default=0.003)
    parser.add_argument("--export", type=Path, help="write a checkpoint here at the end")
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(given).items() if name != "export"}
    training = train(Settings(**settings))
    if given.export:
        export(training.decoder, given.export)


if __name__ == "__main__":
    main()
