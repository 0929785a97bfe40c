"""The fonts pages are printed in. Some ship inside packages that are installed anyway."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ImageFont

# More families for training, regular and bold, from Debian's packages: see the README beside.
_FOLDER = os.environ.get("VL01_NANO_FONTS")

_FAMILIES = {
    "DejaVu Sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    "DejaVu Serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    "DejaVu Sans Mono": ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    "Liberation Sans": ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf"),
    "Liberation Serif": ("LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf"),
    "Liberation Mono": ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf"),
    "Carlito": ("Carlito-Regular.ttf", "Carlito-Bold.ttf"),
    "Caladea": ("Caladea-Regular.ttf", "Caladea-Bold.ttf"),
    "Lato": ("Lato-Regular.ttf", "Lato-Bold.ttf"),
    "Open Sans": ("OpenSans-Regular.ttf", "OpenSans-Bold.ttf"),
    "Roboto": ("Roboto-Regular.ttf", "Roboto-Bold.ttf"),
    "FreeSans": ("FreeSans.ttf", "FreeSansBold.ttf"),
    "FreeSerif": ("FreeSerif.ttf", "FreeSerifBold.ttf"),
    "Hack": ("Hack-Regular.ttf", "Hack-Bold.ttf"),
    "Cabin": ("Cabin-Regular.otf", "Cabin-Bold.otf"),
    "Vollkorn": ("Vollkorn-Regular.ttf", "Vollkorn-Bold.ttf"),
    "Tuffy": ("Tuffy.ttf", "Tuffy_Bold.ttf"),
    "Noto Mono": ("NotoSansMono-Regular.ttf", "NotoSansMono-Bold.ttf"),
    "Courier Prime": ("CourierPrime-Regular.otf", "CourierPrime-Bold.otf"),
}

# Ships inside Pillow; no page of training is printed in it.
HELD_OUT = "Aileron"

# Inside matplotlib, which the project needs for its charts.
ALWAYS_THERE = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")


@dataclass(frozen=True)
class Family:
    """Regular and bold of one design; None as a path is Pillow's own font, which has no bold."""

    name: str
    regular: Path | None
    bold: Path | None

    def at(self, pixels: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
        return _load(self.bold if bold else self.regular, pixels)


@cache
def families() -> tuple[Family, ...]:
    """The families for training that this machine has."""
    folders = [Path(f) for f in (_FOLDER, _matplotlib_fonts()) if f]
    found = []
    for name, files in _FAMILIES.items():
        paths = [_find(folders, file) for file in files]
        if all(paths):
            found.append(Family(name, *paths))
    return tuple(found)


def family(name: str) -> Family:
    if name == HELD_OUT:
        return Family(HELD_OUT, None, None)
    return next(f for f in families() if f.name == name)


def _find(folders: list[Path], file: str) -> Path | None:
    return next((folder / file for folder in folders if (folder / file).is_file()), None)


def _matplotlib_fonts() -> Path | None:
    from importlib.util import find_spec

    spec = find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@cache
def _load(path: Path | None, pixels: int) -> ImageFont.FreeTypeFont:
    if path is None:
        font = ImageFont.load_default(pixels)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)
