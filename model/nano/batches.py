"""Batches for training, made on the fly by worker processes. All pages of one have one layout.

B pages, S tile side, P patches of the grid, T tokens of a question and its answer.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from model.inputs.images import Tiles, prepare_image
from model.inputs.prompt import PromptTemplate
from model.inputs.tiling import Layout, fitted_size
from model.nano.network import CHUNK
from model.nano.pages.fonts import families
from model.nano.pages.page import Page, Wear, make_page
from model.nano.tasks import Answers, Encoded, answers

# What a patch may show: class 0 is nothing. Answers hold no other characters.
ALPHABET = "".join(map(chr, range(33, 127))) + "€£äàáöóüúéèñçß•"
SLOTS = 3  # characters looked for in one patch
_CLASS = {character: i + 1 for i, character in enumerate(ALPHABET)}
CLASSES = len(ALPHABET) + 1


@dataclass(frozen=True)
class Sheetform:
    """A size of page, in pixels as they fit the tiles, and what is printed on it."""

    width: tuple[int, int]
    height: tuple[int, int]
    kinds: tuple[str, ...]


SLIP = Sheetform((300, 336), (300, 336), ("receipt", "text", "form", "table", "text"))
RECEIPT = Sheetform((250, 336), (480, 672), ("receipt", "receipt", "receipt", "text", "form"))
PORTRAIT = Sheetform((450, 530), (672, 672), ("invoice", "invoice", "letter", "form", "text",
                     "table"))  # fmt: skip
LANDSCAPE = Sheetform((672, 672), (400, 560), ("table", "form", "text", "invoice"))


# The chunks of a page, padded in front, and of a question with its answer, padded behind or cut: by
# the tiles of the page's layout. 720 chunks are as many pages of each kind as they should be, so
# that what is compiled for a number of tokens is compiled for two of them, not for each layout.
# One answer in 20 about a page of 5 tiles is longer, and learnt as far as that.
_CHUNKS = {2: (20, 6), 3: (30, 9), 5: (40, 12)}
_CHUNKS_OF_A_SQUARE = (60, 18)  # that fills 2 x 2 tiles: a slip drawn large
_MOST_BEFORE_IMAGE = 16  # tokens

# Of pages in training beside those that come anyway: so many have fields to extract, so many long
# lines in small print. These are what went wrong most.
_MORE_FACTS, _MORE_LONG = 0.3, 0.25
_FACTS, _LONG = ("receipt", "invoice"), ("letter", "text")
_PRINT, _SMALL_PRINT = (15, 22), (15, 17)


@dataclass(frozen=True)
class Plan:
    """What is trained on when. tokens: of pages in a batch, padding too; their number follows.

    easy: the number of batches, at the start, of mostly slips, and these clean. vision: batches
    for the vision tower alone, of so many tiles, without thumbnails and questions.
    """

    tokens: int = 720 * CHUNK
    easy: int = 300
    vision: int = 0

    def form(self, number: int) -> tuple[Sheetform, Wear]:
        random = Random(f"plan/{number}")
        is_easy = number < self.easy
        wear = Wear(0, 0, 0) if is_easy else Wear()
        weights = (8, 1, 1, 0) if is_easy else (3, 4, 6, 3)
        return random.choices((SLIP, RECEIPT, PORTRAIT, LANDSCAPE), weights)[0], wear

    def pages(self, layout: Layout) -> int:
        if self.vision:
            return max(1, self.vision // (layout.tiles - 1))
        return max(1, self.tokens // tokens_of_page(layout))


def tokens_of_page(layout: Layout) -> int:
    """Of the prompt up to the image's end, padding included."""
    return _chunks(layout)[0] * CHUNK


def _chunks(layout: Layout) -> tuple[int, int]:
    usual = _CHUNKS[layout.tiles]
    fits = _MOST_BEFORE_IMAGE + layout.tokens <= usual[0] * CHUNK
    return usual if fits else _CHUNKS_OF_A_SQUARE


@dataclass(frozen=True)
class Asked:
    """To read the page, then something else of every page: B is twice the pages.

    ids: int64 [B, T], suffix of the prompt, answer, end, then 0. is_answer: bool [B, T], where the
    next token is to be learnt. places: int64 [B, T], the token of the prompt that shows the
    character of ids, or -1."""

    ids: Tensor
    is_answer: Tensor
    places: Tensor
    tasks: list[str]


@dataclass(frozen=True)
class Batch:
    """tiles: uint8 [B, tiles, S, S], grey. patches: uint8 [B, P, SLOTS], the classes of what each
    patch of the grid shows. asked: None for the vision tower alone; no tile is a thumbnail then."""

    tiles: Tensor
    patches: Tensor
    asked: Asked | None
    layout: Layout

    @property
    def tokens(self) -> int:
        if self.asked is None:
            return self.tiles.shape[:2].numel() * (self.layout.tile // self.layout.patch) ** 2
        return len(self.tiles) * tokens_of_page(self.layout) + self.asked.ids.numel()

    def to(self, device: torch.device | str) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def copy_(self, other: "Batch") -> None:
        """Overwrites all tensors with those of a batch of the same layout."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs, non_blocking=True)

    def _tensors(self) -> list[Tensor]:
        a = self.asked
        return [self.tiles, self.patches, *((a.ids, a.is_answer, a.places) if a else ())]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        a = self.asked
        asked = a and Asked(change(a.ids), change(a.is_answer), change(a.places), a.tasks)
        return Batch(change(self.tiles), change(self.patches), asked, self.layout)


class Batches(IterableDataset):
    """Batches from number `start` on, without end, each made by one worker from its number."""

    def __init__(
        self,
        plan: Plan,
        tokenizer: Path,
        templates: Mapping[str, PromptTemplate],
        pinpoints: Sequence[tuple[int, int]],
        *,
        start: int = 0,
    ) -> None:
        self._plan, self._start = plan, start
        self._split = "train vision" if plan.vision else "train"
        self._templates, self._pinpoints = templates, pinpoints
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        encoder = Answers(Tokenizer.from_file(str(self._tokenizer)))
        for number in count(self._start + first, step):
            yield self._make(number, encoder)

    def _make(self, number: int, encoder: Answers) -> Batch:
        form, wear = self._plan.form(number)
        random = Random(f"{self._split}/batch/{number}")
        zoom = _zoom(form, random)
        size = round(random.randint(*form.width) * zoom), round(random.randint(*form.height) * zoom)
        pages, tiles, questions = [], [], []
        wanted = 1
        while len(pages) < wanted:
            kinds, sizes = _printed(form, random)
            page = make_page(
                f"{self._split}/{number}/{len(pages)}",
                *size,
                kinds=kinds,
                families=families(),
                wear=wear,
                zoom=zoom,
                sizes=sizes,
            )
            cut = prepare_image(_bmp(page), self._pinpoints)
            wanted = self._plan.pages(cut.layout)
            pages.append(page)
            tiles.append(cut)
            questions.append(() if self._plan.vision else self._ask(page, cut, encoder, random))
        layout = tiles[0].layout
        first = 1 if self._plan.vision else 0
        grey = torch.from_numpy(np.stack([cut.tiles[first:, ..., 0] for cut in tiles]))
        shown = [_patch_classes(page, cut) for page, cut in zip(pages, tiles, strict=True)]
        rows = [row for rows in zip(*questions, strict=True) for row in rows]
        asked = _assemble(rows, _chunks(layout)[1] * CHUNK) if rows else None
        return Batch(grey, torch.from_numpy(np.stack(shown)), asked, layout)

    def _ask(
        self, page: Page, cut: Tiles, encoder: Answers, random: Random
    ) -> list[tuple[str, np.ndarray, Encoded, np.ndarray]]:
        """(task, suffix of the prompt, answer, place of each of its tokens), twice."""
        known = answers(page.content)
        others = [task for task in known if task != "read"]
        extracts = [task for task in others if task.startswith("extract")]
        other = extracts[0] if extracts and random.random() < 0.9 else "describe"
        prefix = len(next(iter(self._templates.values())).prefix_ids)
        tokens_of = prefix + _tokens_of_glyphs(page, cut)
        found = []
        for task in ("read", other):
            answer = encoder.encode(known[task])
            places = np.where(answer.glyphs < 0, -1, tokens_of[answer.glyphs])
            suffix = np.array(self._templates[task].suffix_ids)
            found.append((task, suffix, answer, places))
        return found


def _zoom(form: Sheetform, random: Random) -> float:
    """A slip that is larger than a tile fills 2 x 2 of them: its print is seen at twice the size,
    as is that of any small page of a PDF. Other sheets are only made to fit in another way."""
    if form is SLIP:
        return random.uniform(1.2, 2.2) if random.random() < 0.4 else 1.0
    return random.uniform(1.1, 1.6) if random.random() < 0.25 else 1.0


def _printed(form: Sheetform, random: Random) -> tuple[tuple[str, ...], tuple[int, int]]:
    """What one page may be, and its least and most font size."""
    drawn = random.random()
    if drawn < _MORE_FACTS:
        return tuple(kind for kind in form.kinds if kind in _FACTS), _PRINT
    if drawn < _MORE_FACTS + _MORE_LONG:
        return tuple(kind for kind in form.kinds if kind in _LONG), _SMALL_PRINT
    return form.kinds, _PRINT


def _assemble(rows: list[tuple[str, np.ndarray, Encoded, np.ndarray]], length: int) -> Asked:
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    is_answer = torch.zeros(len(rows), length, dtype=torch.bool)
    places = torch.full((len(rows), length), -1, dtype=torch.int64)
    for i, (_, suffix, answer, shown) in enumerate(rows):
        start, end = len(suffix), min(length, len(suffix) + len(answer.token_ids))
        ids[i, :start] = torch.from_numpy(suffix)
        ids[i, start:end] = torch.from_numpy(answer.token_ids[: end - start])
        is_answer[i, start - 1 : end - 1] = True
        places[i, start:end] = torch.from_numpy(shown[: end - start])
    return Asked(ids, is_answer, places, [task for task, *_ in rows])


def _bmp(page: Page) -> bytes:
    buffer = io.BytesIO()
    page.image.save(buffer, "BMP")
    return buffer.getvalue()


def _grid_places(page: Page, cut: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the patch that each glyph's centre falls in, without the padding."""
    layout = cut.layout
    grid = layout.columns * layout.tile, layout.rows * layout.tile
    fitted = np.array(fitted_size(cut.width, cut.height, *grid))
    offset = (np.array(grid) - fitted) // 2
    pixels = page.centres * (fitted / (cut.width, cut.height)) + offset
    side = layout.tile // layout.patch
    removed = (
        (layout.columns * side - layout.patch_columns) // 2,
        (layout.rows * side - layout.patch_rows) // 2,
    )
    patches = np.floor(pixels / layout.patch).astype(np.int64) - removed
    most = (layout.patch_columns - 1, layout.patch_rows - 1)
    columns, rows = np.clip(patches, 0, most).T
    return rows, columns


def _tokens_of_glyphs(page: Page, cut: Tiles) -> np.ndarray:
    """int64 [glyphs]: which image token shows each, counted from the first."""
    rows, columns = _grid_places(page, cut)
    side = cut.layout.tile // cut.layout.patch
    return side * side + rows * (cut.layout.patch_columns + 1) + columns


def _patch_classes(page: Page, cut: Tiles) -> np.ndarray:
    rows, columns = _grid_places(page, cut)
    layout = cut.layout
    shown = np.zeros((layout.patch_rows * layout.patch_columns, SLOTS), np.uint8)
    used = np.zeros(len(shown), np.int64)
    for character, place in zip(page.glyphs, rows * layout.patch_columns + columns, strict=True):
        if character in _CLASS and used[place] < SLOTS:
            shown[place, used[place]] = _CLASS[character]
            used[place] += 1
    return shown
