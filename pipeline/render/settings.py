"""How large a page is rendered, and what a document may cost. Knows no file format."""

import math
from dataclasses import dataclass

from model.inputs.tiling import fitted_size
from schemas.errors import Reason, RowError

_POINTS_PER_INCH = 72
_LONGEST_POINTS = 1e9  # no paper; what follows stays well within a float's whole numbers


@dataclass(frozen=True)
class PageSettings:
    """What rendering needs to know of the job and the model. Picklable, and plain enough for JSON.

    pinpoints: the model's grids, (width, height) in pixels. dpi: pixels an inch; None: as many as
    the best grid for the page's shape can show. page_seconds: for one page, and for opening the
    document; document_seconds: for all of it. memory_bytes: address space of the child.
    """

    pinpoints: tuple[tuple[int, int], ...] = ((1344, 1344),)
    dpi: float | None = None
    max_pages: int = 10_000
    max_pixels: int = 100_000_000
    page_seconds: float = 30.0
    document_seconds: float = 3600.0
    memory_bytes: int = 2 * 1024**3


def page_pixels(width: float, height: float, settings: PageSettings) -> tuple[int, int]:
    """(width, height) in pixels of a page of `width` x `height` points: at most max_pixels,
    whatever the page claims.

    Without `dpi` it is the largest size that one of the grids holds, so that nothing is rendered
    only to be thrown away again when the page is cut into tiles. Raises RowError.
    """
    if not (0 < width < _LONGEST_POINTS and 0 < height < _LONGEST_POINTS):
        raise RowError(Reason.PAGE_DAMAGED, f"a page of {width:g} x {height:g} points")
    if settings.dpi is None:
        shape = max(1, round(width * 1000)), max(1, round(height * 1000))
        sizes = (fitted_size(*shape, *pinpoint) for pinpoint in settings.pinpoints)
        pixels = max(sizes, key=lambda size: size[0] * size[1])
    else:
        scale = settings.dpi / _POINTS_PER_INCH
        pixels = math.ceil(width * scale), math.ceil(height * scale)
    excess = pixels[0] * pixels[1] / settings.max_pixels
    if excess > 1:
        scale = excess**-0.5
        most = settings.max_pixels  # of one side, where the other is less than a pixel
        return tuple(min(max(1, int(side * scale)), most) for side in pixels)  # type: ignore[return-value]
    return pixels
