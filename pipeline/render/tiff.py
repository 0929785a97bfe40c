"""The frames of a TIFF as images. Runs in the child process only."""

from pathlib import Path

from PIL import Image

from pipeline.render.settings import PageSettings
from schemas.errors import Reason, RowError

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class Tiff:
    """`pages` frames, numbered from 1; of a file with very many, one more than are allowed.

    broken: why the frames after these cannot be reached. Raises what Pillow raises.
    """

    broken: str | None = None

    def __init__(self, path: Path, settings: PageSettings) -> None:
        self._settings = settings
        # Given the path, Pillow maps the pixels, and scrambles a frame that lies on its side.
        self._file = path.open("rb")
        self._image = Image.open(self._file, formats=("TIFF",))
        self.pages = self._count()

    def size(self, number: int) -> tuple[int, int]:
        """(width, height) in pixels. Raises RowError."""
        return self._frame(number).size

    def image(self, number: int) -> Image.Image:
        """The frame as it is, in a mode that PNG has. Raises RowError."""
        frame = self._frame(number)
        try:
            frame.load()
        except Exception as error:  # whatever a decoder does on damaged data, it costs one page
            raise _undecodable(error) from error
        if frame.mode in ("I", "F"):
            raise _undecodable(
                "its pixels are 32-bit numbers without a known white; expected 8 or 16 bits"
            )
        if frame.mode.startswith("I;16"):
            from model.inputs.images import sixteen_bits  # only now: numpy takes its time

            return sixteen_bits(frame)
        if frame.mode in _PNG_MODES:
            return frame
        return frame.convert("RGBA" if frame.has_transparency_data else "RGB")

    def close(self) -> None:
        self._image.close()
        self._file.close()

    def _count(self) -> int:
        """How many frames can be reached: each tells where the next one lies."""
        for number in range(1, self._settings.max_pages + 1):
            try:
                self._image.seek(number)
            except EOFError:
                return number
            except Exception as error:  # Pillow's parsers raise errors of many classes
                self.broken = f"the frames after {number} cannot be reached: {error}"
                return number
        return self._settings.max_pages + 1

    def _frame(self, number: int) -> Image.Image:
        """Not decoded yet; no larger than allowed."""
        try:
            self._image.seek(number - 1)
        except Exception as error:
            raise _undecodable(error) from error
        width, height = self._image.size
        if width * height > self._settings.max_pixels:
            raise RowError(
                Reason.TOO_MANY_PIXELS,
                f"{width} x {height} is {width * height:,} pixels; expected at most "
                f"{self._settings.max_pixels:,} (--max-pixels)",
            )
        return self._image


def _undecodable(error: Exception | str) -> RowError:
    return RowError(Reason.DECODE_ERROR, f"cannot decode this frame: {error}")
