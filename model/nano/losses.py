"""What the small model is trained on: the answers, and four hints that are dropped afterwards.

The one softmax layer in eight must learn where on the page the answer goes on. Left to itself
that takes long; the renderer knows, so it is told. Shapes as in `network` and `batches`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.decoder import Decoder
from model.inputs.prompt import PromptTemplate
from model.layers.linear import Linear
from model.nano.batches import CLASSES, SLOTS, Asked, Batch, tokens_of_page
from model.nano.network import Passed, Steps, embed_pages, grid_order, run_layers, see


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
    balance: float = 0.02


class Losses:
    """The losses of a batch."""

    def __init__(
        self,
        decoder: Decoder,
        heads: Heads,
        template: PromptTemplate,
        steps: Steps,
        *,
        weights: Weights = Weights(),
        tint: bool = True,
    ) -> None:
        self._decoder, self._heads, self._weights = decoder, heads, weights
        self._steps, self._tint = steps, tint
        self.compiled = steps.compiled
        device = decoder.image_newline.device
        self._prefix_ids = torch.tensor(template.prefix_ids, device=device)
        mean, std = decoder.config.image_mean, decoder.config.image_std
        self._mean, self._std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        types = decoder.config.text.layer_types
        self._softmax_layers = [i for i, kind in enumerate(types) if kind == "softmax"]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Every loss, and `loss`, their weighed sum; and the shares of answers' tokens that are
        `wrong` (each after the truth so far) and of printed characters that are `misread` by the
        hint. No page comes twice, so these are what pages never seen would give.
        A batch without questions is for the vision tower alone."""
        features = see(self._decoder, self._pixels(batch.tiles), self._steps)
        if batch.asked is None:
            order = grid_order(batch.layout, features.device)
            grid = features.view(len(batch.tiles), -1, features.shape[-1]).index_select(1, order)
            characters, misread = self._characters(grid.flatten(0, 1), batch)
            return {"loss": characters, "characters": characters, "misread": misread}
        layout, ids = batch.layout, self._prefix_ids
        embedded = embed_pages(self._decoder, features, layout, ids, tokens_of_page(layout))
        start = len(ids) + layout.tokens
        padding = embedded.shape[1] - start
        page = run_layers(self._decoder, embedded, self._steps, padding=padding)
        answers = run_layers(
            self._decoder,
            self._decoder.embed_tokens(batch.asked.ids),
            self._steps,
            memories=page.memories,
            start=start,
        )
        answer, wrong = self._answer(batch.asked, answers.hidden[-1])
        characters, misread = self._characters(_grid(embedded, batch), batch)
        losses = {
            "answer": answer,
            "characters": characters,
            "place": self._place(page.hidden[self._softmax_layers[0] - 1], batch),
            "pointer": self._pointers(batch.asked, answers),
            "balance": page.imbalance,
        }
        parts = [losses["answer"]] + [
            weight * losses[name] for name, weight in vars(self._weights).items()
        ]
        return {"loss": _sum(parts), **losses, "wrong": wrong, "misread": misread}

    def _pixels(self, tiles: Tensor) -> Tensor:
        """uint8 [B, tiles, S, S] to normalised [B * tiles, S, S, 3], on paper of any tint."""
        scale, shift = 1 / (255 * self._std), -self._mean / self._std
        if self._tint:
            scale, shift = scale.expand(len(tiles), 3), shift.expand(len(tiles), 3)
            tint = 1 + 0.05 * torch.randn_like(scale)
            scale, shift = scale * tint, shift * tint + 0.05 * torch.randn_like(shift)
            scale, shift = (x[:, None, None, None] for x in (scale, shift))
        return (tiles[..., None] * scale + shift).flatten(0, 1).to(self._decoder.image_newline)

    def _answer(self, asked: Asked, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Nats a token of all answers, and the share that is wrong."""
        targets = torch.where(asked.is_answer[:, :-1], asked.ids[:, 1:], -1).flatten()
        logits = self._decoder.lm_head(self._decoder.norm(hidden[:, :-1].flatten(0, 1)))
        return _cross_entropy(logits, targets), _wrong(logits, targets, targets >= 0)

    def _characters(self, grid: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats a character on the page, not a patch: most patches are blank. And the share of
        characters that is misread."""
        logits = self._heads.characters(_even(grid)).unflatten(-1, (SLOTS, CLASSES))
        logits, targets = logits.flatten(0, 1), batch.patches.flatten().long()
        shown = (targets > 0).sum().clamp(min=1)
        mean = _cross_entropy(logits, targets)
        return mean * targets.numel() / shown, _wrong(logits, targets, targets > 0)

    def _place(self, hidden: Tensor, batch: Batch) -> Tensor:
        grid, layout = _even(_grid(hidden, batch)), batch.layout
        rows, columns = (torch.arange(n, device=grid.device)
                         for n in (layout.patch_rows, layout.patch_columns))  # fmt: skip
        rows = rows.repeat_interleave(layout.patch_columns).repeat(len(batch.tiles))
        columns = columns.repeat(layout.patch_rows * len(batch.tiles))
        return _cross_entropy(self._heads.row(grid), rows) + _cross_entropy(
            self._heads.column(grid), columns
        )

    def _pointers(self, asked: Asked, answers: Passed) -> Tensor:
        """In the first softmax layer one head looks at the character just read and one at the
        next; in the last one head looks at the next."""
        following = _following(asked)
        first = answers.queries_and_keys[self._softmax_layers[0]]
        last = answers.queries_and_keys[self._softmax_layers[-1]]
        heads = self._decoder.config.text.num_heads
        parts = [
            _pointer(*first, 0, asked.places),
            _pointer(*first, heads - 1, following),
            _pointer(*last, 0, following),
        ]
        return _sum(parts)


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def _following(asked: Asked) -> Tensor:
    """[N, T]: the place of the next token of the answer, or else of the one after it. So a value is
    sought before it is known whether there is one, and the next line before this one is left."""
    places = torch.where(asked.is_answer, asked.places.roll(-1, 1), -1)
    is_followed = asked.is_answer & asked.is_answer.roll(-1, 1)
    return torch.where((places < 0) & is_followed, asked.places.roll(-2, 1), places)


def _grid(hidden: Tensor, batch: Batch) -> Tensor:
    """The tokens of the grid's patches, without thumbnail and newlines: [B * P, W]."""
    layout = batch.layout
    rows = hidden[:, -layout.patch_rows * (layout.patch_columns + 1) :]
    rows = rows.unflatten(1, (layout.patch_rows, layout.patch_columns + 1))[:, :, :-1]
    return rows.flatten(0, 2)


def _even(hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, hidden.shape[-1:])


def _pointer(queries: Tensor, keys: Tensor, head: int, targets: Tensor) -> Tensor:
    """queries [N, T, H, D], keys [N, T', G, D], targets [N, T]: the key of the page that the head
    should choose at each token, or -1. Keys of the answer are left out: no target lies there."""
    group = head * keys.shape[2] // queries.shape[2]
    queries = queries[:, :, head] * queries.shape[-1] ** -0.5
    scores = queries @ keys[:, : keys.shape[1] - queries.shape[1], group].transpose(1, 2)
    return _cross_entropy(scores.flatten(0, 1), targets.flatten())


def _wrong(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    wrong = (logits.detach().argmax(-1) != targets) & counted
    return wrong.sum() / counted.sum().clamp(min=1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over targets that are not -1; 0 if there are none."""
    total = functional.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)
