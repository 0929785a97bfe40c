"""A sheet of paper that text is set on, line by line, keeping where every glyph went."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from model.nano.pages.fonts import Family
from model.nano.pages.marked import Marked, join

Align = Literal["left", "right", "center"]

_MIDDLE = 0.32  # of the font size: where the middle of small letters lies above the baseline


@dataclass(frozen=True)
class Style:
    """How one page is set. Lengths in pixels; ink and paper are shades of grey, 0 is black."""

    family: Family
    size: int
    leading: float = 1.25  # line height over font size
    margin: int = 16
    ink: int = 0
    paper: int = 255


class NoRoomError(Exception):
    """What must be on the page does not fit."""


class Sheet:
    """Lines go below one another; `y` is the top of the next one."""

    def __init__(self, width: int, height: int, style: Style) -> None:
        self.style = style
        self.width, self.height = width, height
        self.image = Image.new("L", (width, height), style.paper)
        self._draw = ImageDraw.Draw(self.image)
        self.glyphs: list[str] = []  # the character that each shows
        self.centres: list[tuple[float, float]] = []  # its (x, y)
        self.left, self.right = style.margin, width - style.margin
        self.y = float(style.margin)

    @property
    def line_height(self) -> float:
        return self.style.size * self.style.leading

    def room(self, keep: float = 0) -> int:
        """Lines that still fit, less `keep`."""
        return int((self.height - self.style.margin - self.y) / self.line_height - keep)

    def skip(self, lines: float) -> None:
        self.y += lines * self.line_height

    def rule(self, width: int = 1) -> None:
        """A line across, in the middle of half a line of space."""
        y = round(self.y + 0.25 * self.line_height)
        self._draw.line((self.left, y, self.right, y), self.style.ink, width)
        self.skip(0.5)

    def box(self, left: float, top: float, right: float, bottom: float) -> None:
        self._draw.rectangle((left, top, right, bottom), outline=self.style.ink)

    def upright(self, x: float, top: float, bottom: float) -> None:
        self._draw.line((x, top, x, bottom), self.style.ink)

    def font(self, bold: bool = False, scale: float = 1) -> ImageFont.FreeTypeFont:
        return self.style.family.at(round(self.style.size * scale), bold=bold)

    def line(
        self,
        text: str,
        *,
        align: Align = "left",
        bold: bool = False,
        scale: float = 1,
        left: float | None = None,
        right: float | None = None,
        whole: bool = False,
    ) -> Marked:
        """Set one line, cut to the words that fit between `left` and `right`, and go below it.

        Raises NoRoomError when it must stay `whole` and does not fit, or is below the sheet.
        """
        set_text = self.put(
            text, align=align, bold=bold, scale=scale, left=left, right=right, whole=whole
        )
        self.skip(scale)
        return set_text

    def put(
        self,
        text: str,
        *,
        align: Align = "left",
        bold: bool = False,
        scale: float = 1,
        left: float | None = None,
        right: float | None = None,
        whole: bool = False,
    ) -> Marked:
        """As `line`, but stay on it."""
        left = self.left if left is None else left
        right = self.right if right is None else right
        font = self.font(bold, scale)
        fitted = _fit(text, font, right - left)
        if (whole and fitted != text) or self.y + self.line_height * scale > self.height:
            raise NoRoomError(text)
        text = fitted
        width = _length(font, text)
        x = {"left": left, "right": right - width, "center": (left + right - width) / 2}[align]
        baseline = self.y + self.line_height * scale * 0.5 + font.size * _MIDDLE
        return self._set(text, font, round(x), round(baseline))

    def wrap(self, text: str, *, left: float | None = None, lines: int = 99) -> Marked:
        """Set a paragraph in at most so many lines; the rest of the text is dropped."""
        left = self.left if left is None else left
        font, words, set_lines = self.font(), text.split(" "), []
        while words and len(set_lines) < min(lines, max(self.room(), 1)):
            count = _words_that_fit(words, font, self.right - left)
            set_lines.append(self.line(" ".join(words[:count]), left=left))
            words = words[count:]
        return join(" ", set_lines)

    def _set(self, text: str, font: ImageFont.FreeTypeFont, x: int, baseline: int) -> Marked:
        self._draw.text((x, baseline), text, self.style.ink, font, anchor="ls")
        advances = [_advance(font, character) for character in text]
        # Kerning makes a line a little shorter than the sum of its characters.
        scale = _length(font, text) / max(sum(advances), 1e-6)
        self.glyphs += text
        y, glyphs, reached = baseline - _MIDDLE * font.size, [], float(x)
        for advance in advances:
            glyphs.append(len(self.centres))
            self.centres.append((reached + advance * scale / 2, y))
            reached += advance * scale
        return Marked(text, tuple(glyphs))


@lru_cache(maxsize=16)
def _length(font: ImageFont.FreeTypeFont, text: str) -> float:
    """A line is measured three times while it is set."""
    return font.getlength(text)


_advances: dict[tuple[int, str], float] = {}


def _advance(font: ImageFont.FreeTypeFont, character: str) -> float:
    key = (id(font), character)  # fonts are cached for ever, so an id stays that of its font
    if key not in _advances:
        _advances[key] = font.getlength(character)
    return _advances[key]


def _words_that_fit(words: list[str], font: ImageFont.FreeTypeFont, width: float) -> int:
    space, used = _advance(font, " "), 0.0
    for count, word in enumerate(words):
        used += sum(_advance(font, c) for c in word) + space * (count > 0)
        if used > width:
            return max(1, count)
    return len(words)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if _length(font, text) <= width:
        return text
    words = text.split(" ")
    text = " ".join(words[: _words_that_fit(words, font, width)]).rstrip(" ,;:-&")
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text
