"""Whether a page is blank: nothing on it but paper, and what scanning adds. Knows no files.

To be wrong costs a page its text, so whatever might be ink counts as ink: a lone page number, a
comma. Noise, shading, a dust speck and a dark edge do not.
"""

import numpy as np
from PIL import Image

_BLOCKS = 800  # along the longer side: 0.4 mm of A4, about as wide as the stroke of small print
_CELL = 16  # blocks a side, whose mean is what the paper looks like there
_EDGE = 0.02  # of each side is not looked at: 6 mm of A4, where scanners leave their shadow
_CONTRAST = 16  # of 255, by which a block of ink differs from its paper
_SPECK = 3  # blocks: fewer are dust; a comma in 8 point has about four


def is_blank(image: Image.Image) -> bool:
    """image: in mode L or RGB. Blocks are compared with their surroundings, each colour alone."""
    blocks = image.reduce(max(1, round(max(image.size) / _BLOCKS)))
    left, top = round(blocks.width * _EDGE), round(blocks.height * _EDGE)
    inner = blocks.crop((left, top, blocks.width - left, blocks.height - top))
    paper = np.asarray(inner.reduce(_CELL), np.int16).repeat(_CELL, 0).repeat(_CELL, 1)
    differs = np.abs(np.asarray(inner, np.int16) - paper[: inner.height, : inner.width])
    ink = differs > _CONTRAST
    return bool(np.count_nonzero(ink.any(2) if ink.ndim == 3 else ink) < _SPECK)
