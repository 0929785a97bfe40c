"""Text that remembers where on the page each of its characters was drawn."""

from collections.abc import Iterable
from dataclasses import dataclass

NOWHERE = -1


@dataclass(frozen=True)
class Marked:
    """`glyphs[i]` is the number of the glyph that shows `text[i]`, NOWHERE if none does."""

    text: str
    glyphs: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.text) != len(self.glyphs):
            raise ValueError(f"{len(self.text)} characters, {len(self.glyphs)} glyphs")

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, part: slice) -> "Marked":
        return Marked(self.text[part], self.glyphs[part])

    def __add__(self, other: "Marked | str") -> "Marked":
        other = marked(other)
        return Marked(self.text + other.text, self.glyphs + other.glyphs)

    def __radd__(self, other: str) -> "Marked":
        return marked(other) + self

    def only(self, characters: str) -> "Marked":
        """Without all characters but these."""
        kept = [i for i, c in enumerate(self.text) if c in characters]
        return Marked("".join(self.text[i] for i in kept), tuple(self.glyphs[i] for i in kept))


def marked(text: Marked | str) -> Marked:
    """Plain text as text that stands nowhere on the page."""
    return text if isinstance(text, Marked) else Marked(text, (NOWHERE,) * len(text))


def join(separator: str, parts: Iterable[Marked | str]) -> Marked:
    whole: Marked | None = None
    for part in parts:
        whole = marked(part) if whole is None else whole + separator + part
    return whole or marked("")
