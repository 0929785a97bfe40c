"""Trains the small checkpoint, in sittings: each goes on from what the last one left.

    python -m model.nano.train STATE [--seconds 500] [--vision 0] [--decay 200] [--export DIR]

STATE is a folder: the weights and the optimizer's memory in files of less than 16 MiB, and the
curve. A sitting ends after so many seconds, and on a GPU takes all of its cores to draw pages.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
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
from model.nano.batches import Batch, Batches, Plan
from model.nano.export import export
from model.nano.gradients import Gradients
from model.nano.losses import Heads, Losses, Weights
from model.nano.network import Steps
from model.nano.optimizer import Optimizer
from model.nano.random_checkpoint import NanoSizes
from model.nano.sizes import NANO, write_nano_configuration
from model.nano.tasks import prompts
from model.tokenizer import Tokenizer

_PIECE_BYTES = 15 << 20
_WARM_UP = 100  # batches of a sitting over which the learning rate rises


@dataclass(frozen=True)
class Settings:
    """seconds: of this sitting. vision: seconds at its start for the vision tower alone. decay:
    seconds at its end over which the learning rate falls to 0; without, it stays, and another
    sitting can go on from there. tiles: of a batch for the vision tower."""

    state: Path
    seconds: float
    vision: float = 0.0
    decay: float = 0.0
    device: str = "cuda"
    compiled: bool = False
    workers: int = 15
    tokens: int = Plan.tokens
    tiles: int = 72
    seed: int = 0
    size: NanoSizes = NANO
    weights: Weights = field(default_factory=Weights)
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    most_batches: int | None = None
    easy: int = 300
    log_every: int = 50
    save_every: float = 100.0


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
        self._folder = tempfile.TemporaryDirectory()  # as the state travels in few files
        self.configuration = Path(self._folder.name)
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

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from (parameter for _, parameter in self._named())

    def losses(self, compiled: bool) -> Losses:
        template, steps = self.templates["read"], Steps(compiled=compiled)
        return Losses(self.decoder, self.heads, template, steps, weights=self.settings.weights)

    @property
    def templates(self) -> dict:
        tokenizer = Tokenizer.from_checkpoint(self.configuration)
        return {task: tokenizer.prompt_template(text) for task, text in prompts().items()}

    def batches(self, plan: Plan) -> DataLoader:
        settings = self.settings
        dataset = Batches(
            plan,
            self.configuration / "tokenizer.json",
            self.templates,
            self.decoder.config.pinpoints,
            start=self.number,
        )
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=settings.workers,
            prefetch_factor=4 if settings.workers else None,
            pin_memory=settings.device == "cuda",
        )

    def save(self) -> None:
        """In pieces, each a safetensors file of its own that replaces the last one's at once: a
        kill leaves whole files, at worst of two moments of the training."""
        pieces = self._pieces()
        for i, piece in enumerate(pieces):
            path = self.settings.state / f"state-{i}.safetensors"
            save_file(piece, self.configuration / path.name)
            shutil.copy(self.configuration / path.name, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        for old in self.settings.state.glob("state-*.safetensors"):
            if int(old.stem.split("-")[1]) >= len(pieces):
                old.unlink()
        progress = {"batches": self.number}
        (self.settings.state / "progress.json").write_text(json.dumps(progress))

    def _pieces(self) -> list[dict[str, torch.Tensor]]:
        pieces: list[dict[str, torch.Tensor]] = [{}]
        for name, kinds in self.optimizer.state_dict().items():
            for kind, value in kinds.items():
                size = sum(v.nbytes for v in pieces[-1].values())
                if size + value.nbytes > _PIECE_BYTES:
                    pieces.append({})
                pieces[-1][f"{name}/{kind}"] = value.cpu().contiguous()
        return pieces

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
    """One sitting. Appends to STATE/curve.jsonl; saves STATE now and then, and at the end."""
    torch.set_float32_matmul_precision("high")
    if settings.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are not recorded on the default one
    sitting = Sitting(settings)
    pages, tiles = sitting.batches(Plan(settings.tokens, settings.easy)), None
    if settings.vision:
        tiles = sitting.batches(Plan(easy=0, vision=settings.tiles))
    while tiles is not None and sitting.seconds() < settings.vision and not sitting.is_over():
        sitting.step(next(tiles))
    while not sitting.is_over():
        sitting.step(next(pages))
    sitting.training.save()
    return sitting.training


class Sitting:
    """The clock, the losses and the log around a Training."""

    def __init__(self, settings: Settings) -> None:
        self._begin = self._saved = time.monotonic()
        self._settings = settings
        self.training = Training(settings)
        self._first = self.training.number
        self._log = Log(settings.state / "curve.jsonl", settings.log_every)
        self._gradients = Gradients(
            self.training.losses,
            list(self.training.parameters()),
            compiled=settings.compiled,
            recorded=settings.device == "cuda",
        )

    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def is_over(self) -> bool:
        most = self._settings.most_batches
        if most is not None and self.training.number - self._first >= most:
            return True
        return self.seconds() >= self._settings.seconds

    def batches(self, plan: Plan) -> Iterator[Batch]:
        return iter(self.training.batches(plan))

    def step(self, batch: Batch) -> None:
        settings, training = self._settings, self.training
        found = self._gradients(batch)
        left = max(0.0, settings.seconds - self.seconds())
        fall = min(1.0, left / settings.decay) if settings.decay else 1.0
        rise = min(1.0, (training.number - self._first + 1) / _WARM_UP)
        training.optimizer.step(rise * fall)
        training.number += 1
        self._log.add(training.number, batch, found, rise * fall)
        if time.monotonic() - self._saved > settings.save_every:
            training.save()
            self._saved = time.monotonic()


class Log:
    """The mean losses of every so many batches, one JSON object a line. FloatingPointError ends a
    sitting whose loss is no number any more: STATE keeps what was saved before."""

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
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"the loss is {means['loss']} at batch {number}")
        self._sums, self._batches, self._pages, self._tokens = {}, 0, 0, 0
        self._since = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small VL-01 checkpoint.")
    add = parser.add_argument
    add("state", type=Path, help="folder of the state, made if there is none")
    add("--seconds", type=float, default=500, help="length of this sitting")
    add("--vision", type=float, default=0, help="seconds at its start for the vision tower alone")
    add("--decay", type=float, default=0, help="seconds of falling rate, at its end")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    add("--tokens", type=int, default=Plan.tokens, help="of the pages in a batch")
    add("--tiles", type=int, default=72, help="in a batch for the vision tower alone")
    add("--easy", type=int, default=300, help="the number of the last batch of easy pages")
    add("--compiled", action="store_true", help="through torch.compile")
    add("--matrix-rate", type=float, default=0.02)
    add("--other-rate", type=float, default=0.003)
    add("--export", type=Path, help="write a checkpoint here at the end")
    given = vars(parser.parse_args())
    folder = given.pop("export")
    given["state"].mkdir(parents=True, exist_ok=True)
    training = train(Settings(**given))
    if folder:
        export(training.decoder, folder)


if __name__ == "__main__":
    main()
