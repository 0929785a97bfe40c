"""What the small model is trained on: the answers, and four hints that are dropped afterwards.

The one softmax layer in eight must learn where on the page the answer goes on. Left to itself
that takes long; the renderer knows, so it is told. Shapes as in `network` and `batches`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.decoder import Decoder
from model.inputs.prompt import PromptTemplate
from model.layers.linear import Linear
from model.nano.batches import CLASSES, SLOTS, Asked, Batch
from model.nano.network import LayerOutput, Runner, embed_pages, whole_chunks
from model.vision.tower import VisionLayer


class Heads(nn.Module):
    """Read off the image tokens, in training only: the characters in a patch, right after the
    projector; its row and column on the page, before the first softmax layer."""

    def __init__(self, hidden: int, side: int, **where: Any) -> None:
        super().__init__()
        self.characters = Linear(hidden, SLOTS * CLASSES, bias=True, **where)
        self.row = Linear(hidden, side, bias=True, **where)
        self.column = Linear(hidden, side, bias=True, **where)


@dataclass(frozen=True)
class Weights:
    """Of the hints, beside 1 for the answers."""

    characters: float = 0.5
    place: float = 0.1
    pointer: float = 0.3
    balance: float = 0.01


class Losses:
    """The losses of a batch. `compiled`: through torch.compile, layer by layer."""

    def __init__(
        self,
        decoder: Decoder,
        heads: Heads,
        template: PromptTemplate,
        weights: Weights = Weights(),
        *,
        compiled: bool = False,
        tint: bool = True,
    ) -> None:
        self._decoder, self._heads, self._weights = decoder, heads, weights
        self._prefix_ids = template.prefix_ids
        self._tint = tint
        self._run = Runner(decoder, compiled=compiled)
        if compiled:
            forward = torch.compile(VisionLayer.forward, dynamic=True)
            layers: Any = decoder.vision_tower.layers
            for layer in layers:
                layer.forward = partial(forward, layer)
        mean, std = decoder.config.image_mean, decoder.config.image_std
        device = decoder.image_newline.device
        self._mean, self._std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        types = decoder.config.text.layer_types
        self._softmax_layers = [i for i, kind in enumerate(types) if kind == "softmax"]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Every loss, and `loss`, their weighed sum."""
        decoder, layout = self._decoder, batch.layout
        embedded = embed_pages(decoder, self._pixels(batch.tiles), layout, self._prefix_ids)
        whole, padding = whole_chunks(embedded)
        page = self._run(whole, padding=padding)
        runs = [
            self._run(
                decoder.embed_tokens(asked.ids),
                [output.memory for output in page],
                embedded.shape[1],
            )
            for asked in batch.asked
        ]
        losses = {
            "answer": self._answer(batch.asked, runs),
            "characters": self._characters(embedded, batch),
            "place": self._place(page[self._softmax_layers[0] - 1].hidden, batch),
            "pointer": _sum(map(self._pointers, batch.asked, runs)) / len(runs),
            "balance": _sum(_imbalance(output.routing) for output in page),
        }
        parts = [losses["answer"]] + [
            weight * losses[name] for name, weight in vars(self._weights).items()
        ]
        return {"loss": _sum(parts), **losses}

    def _pixels(self, tiles: Tensor) -> Tensor:
        """uint8 [B, tiles, S, S] to normalised [B, tiles, S, S, 3], on paper of any tint."""
        pixels = (tiles[..., None] / 255 - self._mean) / self._std
        if self._tint:
            shape = (len(tiles), 1, 1, 1, 3)
            pixels = pixels * (1 + 0.05 * torch.randn(shape, device=tiles.device))
            pixels = pixels + 0.05 * torch.randn(shape, device=tiles.device)
        return pixels.to(self._decoder.image_newline.dtype)

    def _answer(self, asked: list[Asked], runs: list[list[LayerOutput]]) -> Tensor:
        """Nats a token of all answers."""
        hidden = [run[-1].hidden[:, :-1].flatten(0, 1) for run in runs]
        targets = [torch.where(a.is_answer[:, :-1], a.ids[:, 1:], -1).flatten() for a in asked]
        logits = self._decoder.lm_head(self._decoder.norm(torch.cat(hidden)))
        return _cross_entropy(logits, torch.cat(targets))

    def _grid(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The tokens of the grid's patches, without thumbnail and newlines: [B * P, W]."""
        layout = batch.layout
        rows = hidden[:, -layout.patch_rows * (layout.patch_columns + 1) :]
        rows = rows.unflatten(1, (layout.patch_rows, layout.patch_columns + 1))[:, :, :-1]
        normed = functional.rms_norm(rows, rows.shape[-1:])
        return normed.flatten(0, 2)

    def _characters(self, embedded: Tensor, batch: Batch) -> Tensor:
        """Nats a character on the page, not a patch: most patches are blank."""
        logits = self._heads.characters(self._grid(embedded, batch)).unflatten(-1, (SLOTS, CLASSES))
        targets = batch.patches.flatten(0, 1).long()
        shown = (targets > 0).sum().clamp(min=1)
        mean = _cross_entropy(logits.flatten(0, 1), targets.flatten())
        return mean * targets.numel() / shown

    def _place(self, hidden: Tensor, batch: Batch) -> Tensor:
        grid, layout = self._grid(hidden, batch), batch.layout
        device = grid.device
        rows = torch.arange(layout.patch_rows, device=device).repeat_interleave(
            layout.patch_columns
        )
        columns = torch.arange(layout.patch_columns, device=device).repeat(layout.patch_rows)
        pages = len(batch.tiles)
        return _cross_entropy(self._heads.row(grid), rows.repeat(pages)) + _cross_entropy(
            self._heads.column(grid), columns.repeat(pages)
        )

    def _pointers(self, asked: Asked, answers: list[LayerOutput]) -> Tensor:
        """In the first softmax layer one head looks at the character just read and one at the
        next; in the last one head looks at the next."""
        following = torch.where(asked.is_answer[:, :-1], asked.places[:, 1:], -1)
        following = functional.pad(following, (0, 1), value=-1)
        first, last = answers[self._softmax_layers[0]], answers[self._softmax_layers[-1]]
        heads = self._decoder.config.text.num_heads
        parts = [
            _pointer(*_queries_and_keys(first, 0), asked.places),
            _pointer(*_queries_and_keys(first, heads - 1), following),
            _pointer(*_queries_and_keys(last, 0), following),
        ]
        return _sum(parts)


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def _queries_and_keys(output: LayerOutput, head: int) -> tuple[Tensor, Tensor]:
    assert output.queries_and_keys is not None
    queries, keys = output.queries_and_keys
    group = head * keys.shape[2] // queries.shape[2]
    return queries[:, :, head], keys[:, :, group]


def _pointer(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """queries [N, T, D], keys [N, T', D], targets [N, T]: the key each should choose, or -1.

    All keys are of the page or before the query's own token only as far as the mask of the answer
    goes, which no target lies behind: the keys of the answer are left out.
    """
    keys = keys[:, : keys.shape[1] - queries.shape[1]]
    scores = queries @ keys.transpose(1, 2) * queries.shape[-1] ** -0.5
    return _cross_entropy(scores.flatten(0, 1), targets.flatten())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over targets that are not -1; 0 if there are none."""
    total = functional.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def _imbalance(routing: Tensor) -> Tensor:
    """1 when all experts are as likely (Switch Transformer, arXiv 2101.03961, section 2.2)."""
    probabilities = routing.flatten(0, 1)
    experts = probabilities.shape[1]
    chosen = functional.one_hot(probabilities.argmax(-1), experts).float().mean(0)
    return experts * (chosen * probabilities.mean(0)).sum()
