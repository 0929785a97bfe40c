"""The process that opens documents: `python -m pipeline.render.worker FD SETTINGS`.

Answers the requests of a Renderer, one at a time. What it reads is hostile: it is killed when it is
late, dies when it takes too much memory, and ends with its parent. Imports neither ray nor torch.
"""

import io
import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from model.child import die_with_parent
from pipeline.render.pdf import Pdf
from pipeline.render.settings import PageSettings
from pipeline.render.tiff import Tiff
from schemas.errors import Reason, RowError

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ANY_GRID = ((336, 336),)  # which one makes no difference to a decoder
_ANY_SIZE = 2**63  # bytes: whoever read the file has looked at that
_LONGEST_MESSAGE = 2000
_PDF_WITHIN = 1024  # bytes; the mark may follow others, as every viewer allows

Answer = tuple[dict[str, Any], bytes]


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent decides
    settings = PageSettings(**json.loads(sys.argv[2]))
    resource.setrlimit(resource.RLIMIT_AS, (settings.memory_bytes, settings.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = None  # ours is checked before anything is decoded
    channel = Connection(int(sys.argv[1]))
    channel.send_bytes(b"{}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # codecs complain there at length
    _serve(channel, Worker(settings))


def _serve(channel: Connection, worker: "Worker") -> None:
    while True:
        try:
            request = json.loads(channel.recv_bytes())
        except EOFError:
            return
        try:
            header, data = getattr(worker, request["do"])(request["with"])
        except RowError as error:
            header, data = (
                {"reason": error.reason, "message": error.message[:_LONGEST_MESSAGE]},
                b"",
            )
        except MemoryError:
            os._exit(1)  # a fresh process has all of its memory
        except Exception as error:  # whatever a library does on damaged data, it costs one page
            message = f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
            header, data = {"reason": Reason.PAGE_DAMAGED, "message": message}, b""
        channel.send_bytes(json.dumps(header).encode())
        channel.send_bytes(data)


class Worker:
    """What can be asked of the process. At most one document is open."""

    def __init__(self, settings: PageSettings) -> None:
        self._settings = settings
        self._document: Pdf | Tiff | None = None

    def open(self, path: str) -> Answer:
        """Opens a document in the place of the one before. None for a plain image."""
        if self._document:
            self._document.close()
        self._document = _open(Path(path), self._settings)
        if self._document is None:
            return {"pages": None, "broken": None}, b""
        return {"pages": self._document.pages, "broken": self._document.broken}, b""

    def size(self, number: int) -> Answer:
        assert self._document
        return {"size": self._document.size(number)}, b""

    def image(self, number: int) -> Answer:
        assert self._document
        buffer = io.BytesIO()
        image = self._document.image(number)
        image.save(buffer, "PNG", compress_level=1, icc_profile=None)
        return {}, buffer.getvalue()

    def decode(self, path: str) -> Answer:
        """Does what decoding an image and resizing it takes. A RowError is for who prepares it."""
        from model.inputs.images import (
            DecodeLimits,
            prepare_image,
        )  # only now: numpy takes its time

        limits = DecodeLimits(self._settings.max_pixels, _ANY_SIZE, self._settings.page_seconds)
        try:
            prepare_image(Path(path).read_bytes(), _ANY_GRID, limits=limits)
        except RowError as error:
            if isinstance(error.__cause__, MemoryError):
                raise MemoryError from error
        return {}, b""


def _open(path: Path, settings: PageSettings) -> Pdf | Tiff | None:
    """None for a file that is, or seems to be, one plain image. Raises RowError."""
    try:
        with path.open("rb") as file:
            start = file.read(_PDF_WITHIN)
    except OSError as error:
        raise RowError(Reason.READ_ERROR, str(error)) from error
    if start.startswith(_TIFF):
        return _open_tiff(path, settings)
    if start and (path.suffix.lower() == ".pdf" or b"%PDF-" in start):
        return Pdf(path, settings)
    return None


def _open_tiff(path: Path, settings: PageSettings) -> Tiff | None:
    try:
        tiff = Tiff(path, settings)
    except MemoryError:
        raise
    except Exception:  # preparing it as an image says what is wrong
        return None
    return tiff if tiff.pages > 1 or tiff.broken else None


if __name__ == "__main__":
    main()
