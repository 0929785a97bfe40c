"""Charts as inline SVG. Colours are CSS variables of the page, so they follow light and dark.

Text stays text, in the page's own font. Drawn with matplotlib, without its global state.
"""

import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from schemas.report import Distribution, Throughput

# Stand-ins that no chart has by chance, and what they become.
_INK, _MUTED, _LINE, _ACCENT, _SOFT = "#010201", "#010202", "#010203", "#010204", "#010205"
_COLOURS = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _ACCENT: "var(--accent)",
    _SOFT: "var(--soft)",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "path.simplify": False,
}
NARROW, WIDE = 350, 1120  # points, which are the page's pixels where there is room
_HEIGHT = 170


def histogram(name: str, values: Distribution) -> Markup:
    """Rows by value; the median as a line."""
    if not values.counts:
        return Markup("")
    with _style(name):
        figure, axes = _axes(NARROW)
        widths = [b - a for a, b in zip(values.edges, values.edges[1:], strict=False)]
        gap = 0.88 if len(widths) > 1 else 0.3
        bars = [width * gap for width in widths]
        centres = [edge + width / 2 for edge, width in zip(values.edges, widths, strict=False)]
        whole = all(float(edge).is_integer() for edge in values.edges)
        if whole:
            centres = [centre - 0.5 for centre in centres]  # the middle of its whole numbers
        axes.bar(centres, values.counts, bars, color=_ACCENT, linewidth=0)
        if values.median is not None and len(widths) > 1:
            axes.axvline(values.median, color=_INK, linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
        axes.margins(x=0.02)
        return _svg(figure, name)


def throughput(values: Throughput, width: int) -> Markup:
    """Rows a second over the time that runs worked; a line where one run ended."""
    if not values.rows:
        return Markup("")
    with _style(f"throughput-{width}"):
        figure, axes = _axes(width)
        seconds = values.bin_seconds * len(values.rows)
        unit, name = next(
            (unit, name)
            for unit, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
            if seconds >= 2 * unit or unit == 1
        )
        edges = [values.bin_seconds * i / unit for i in range(len(values.rows) + 1)]
        rates = [rows / values.bin_seconds for rows in values.rows]
        axes.stairs(rates, edges, fill=True, color=_SOFT)
        axes.stairs(rates, edges, color=_ACCENT, linewidth=1.5)
        for end in values.run_ends:
            axes.axvline(end / unit, color=_MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_xlim(0, edges[-1])
        axes.set_xlabel(f"{name} of work", loc="right")
        return _svg(figure, f"throughput-{width}")


def _style(salt: str) -> AbstractContextManager[None]:
    """salt: ids made of it are the same whenever the chart is drawn again."""
    style: Any = _STYLE | {"svg.hashsalt": salt}
    return matplotlib.rc_context(style)


def _axes(width: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / 72, _HEIGHT / 72), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=_LINE, linewidth=1)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    return figure, axes


def _svg(figure: Figure, name: str) -> Markup:
    """The bare <svg>: no prolog, no metadata, nothing that names another host."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font: (\d+)px [^;\"]*", r"font: \1px var(--font)", text)
    text = re.sub(r'(id="|#)(?!0)(?=[a-zA-Z])', rf"\g<1>{name}-", text)  # unique on the page
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    return Markup(text)  # made here, of numbers alone


def short_number(value: float) -> str:
    """1234567 as 1.2M; few digits, no trailing zeros."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}".replace("-", "\u2212")
    return f"{value:.3g}".replace("-", "\u2212")
