"""Whether a page is blank: nothing on it but paper, and what scanning adds. Knows no files.

To be wrong costs a page its text, so whatever might be ink counts as ink: a lone page number, a
comma. Noise, shading, a dust speck and a dark edge do not.
"""

from PIL import Image, ImageChops

_BLOCKS = 800  # along the longer side: 0.4 mm of A4, about as wide as the stroke of small print
_CELL = 16  # blocks a side, whose mean is what the paper looks like there
_EDGE = 0.02  # of each side is not looked at: 6 mm of A4, where scanners leave their shadow
_CONTRAST = 16  # of 255, by which a block of ink differs from its paper
_SPECK = 3  # blocks: fewer are dust; a comma in 8 point has about four


def is_blank(image: Image.Image) -> bool:
    """image: in mode L or RGB. The middle is looked at first: there most pages show their ink."""
    return not (_has_ink(image, 0.3) or _has_ink(image, _EDGE))


def _has_ink(image: Image.Image, edge: float) -> bool:
    """Whether blocks differ from their surroundings, in one colour at least. edge: of each side,
    left out."""
    left, top = int(image.width * edge), int(image.height * edge)
    box = left, top, image.width - left, image.height - top
    blocks = image.reduce(max(1, round(max(image.size) / _BLOCKS)), box)
    cells = blocks.reduce(_CELL)
    paper = cells.resize((cells.width * _CELL, cells.height * _CELL), Image.Resampling.NEAREST)
    differs = ImageChops.difference(blocks, paper.crop((0, 0, *blocks.size))).histogram()
    colours = range(0, len(differs), 256)
    return any(sum(differs[at + _CONTRAST + 1 : at + 256]) >= _SPECK for at in colours)
