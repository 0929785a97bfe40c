"""Asks a child process for the pages of documents; what becomes of the child costs one page.

It also tries out images that may crash a decoder.
The child is started when it is first needed and serves one document after the other. One that is
late is killed, one that dies is replaced, and the next page is asked of a fresh one.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from pipeline.formats.row import row_error
from pipeline.render.settings import PageSettings
from schemas.errors import EngineError, Reason, RowError

_START_SECONDS = 120.0  # on a machine that is busy with other things
_MOST_HEADER_BYTES = 64 * 1024


class Opened(NamedTuple):
    """pages: None for a file that is one plain image. broken: why those after them are lost."""

    pages: int | None
    broken: str | None


class Renderer:
    """For one thread: the child is killed when the thread that started it ends."""

    def __init__(self, settings: PageSettings) -> None:
        self._settings = settings
        self._child: _Child | None = None
        self._path = ""
        self._seconds = 0.0  # that the document may still take

    def open(self, path: str) -> Opened:
        """The document whose pages are asked for next. Raises RowError."""
        self._path, self._seconds = path, self._settings.document_seconds
        if self._child:
            self._child.holds = None
        header, _ = self._ask("open", path)
        return Opened(header["pages"], header["broken"])

    def size(self, number: int) -> tuple[int, int]:
        """(width, height) in pixels of the image of a page, from 1; renders nothing."""
        header, _ = self._ask("size", number)
        width, height = header["size"]
        return width, height

    def image(self, number: int) -> bytes:
        """A page, from 1, as a PNG. Raises RowError."""
        return self._ask("image", number)[1]

    def decode(self, image: memoryview | bytes) -> None:
        """Decodes an image and forgets it. Raises RowError if the child dies of it or is late; what
        else is wrong with the image is not told."""
        self._path, self._seconds = "", self._settings.document_seconds
        with tempfile.NamedTemporaryFile() as file:
            file.write(image)
            file.flush()
            self._ask("decode", file.name)

    def close(self) -> None:
        if self._child:
            self._child.kill()
            self._child = None

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: str, argument: str | int) -> tuple[dict[str, Any], bytes]:
        """What the child answers. Raises RowError: its own, TIMEOUT, or CRASH.

        A child that dies may have come to harm earlier: only a fresh one convicts the page.
        """
        before = time.monotonic()
        if self._seconds <= 0:
            raise self._late()
        try:
            try:
                return self._try(what, argument)
            except _DiedError:
                return self._try(what, argument)
        except _DiedError as death:
            gib = self._settings.memory_bytes / 1024**3
            raise RowError(
                Reason.CRASH, f"the process that decodes it {death} (it may use {gib:.2g} GiB)"
            ) from None
        finally:
            self._seconds -= time.monotonic() - before

    def _try(self, what: str, argument: str | int) -> tuple[dict[str, Any], bytes]:
        self._child = self._child or _Child(self._settings)
        try:
            if self._path and what != "open" and self._child.holds != self._path:
                self._answer("open", self._path)
            return self._answer(what, argument)
        except _DiedError:
            self.close()
            raise

    def _answer(self, what: str, argument: str | int) -> tuple[dict[str, Any], bytes]:
        assert self._child
        seconds = min(self._settings.page_seconds, self._seconds)
        answer = self._child.ask({"do": what, "with": argument}, seconds)
        if answer is None:
            self.close()
            raise self._late()
        header, data = answer
        if "reason" in header:
            raise row_error(Reason(header["reason"]), header["message"])
        if what == "open":
            self._child.holds = self._path
        return header, data

    def _late(self) -> RowError:
        limits = self._settings
        if self._seconds < limits.page_seconds:
            spent = f"the document's {limits.document_seconds:g} seconds are over"
            return RowError(Reason.TIMEOUT, f"{spent} (--document-seconds)")
        flag = "--page-seconds" if self._path else "--decode-seconds"
        return RowError(Reason.TIMEOUT, f"not done within {limits.page_seconds:g} seconds ({flag})")


class _DiedError(Exception):
    """How a child ended that nobody killed."""


class _Child:
    """The process. holds: the path of the document that is open in it."""

    holds: str | None = None

    def __init__(self, settings: PageSettings) -> None:
        self._most_bytes = 4 * settings.max_pixels + 1024**2  # a PNG is no larger than its pixels
        ours, theirs = socket.socketpair()
        self._channel = Connection(ours.detach())
        module = [sys.executable, "-m", "pipeline.render.worker"]
        with theirs:
            self._process = subprocess.Popen(
                [*module, str(theirs.fileno()), json.dumps(asdict(settings))],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OPENBLAS_NUM_THREADS": "1",  # each would reserve address space
                },
            )
        self._wait_until_ready()

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], bytes] | None:
        """Header and data; None if it was not done in time, and killed. Raises _DiedError."""

        def exchange() -> tuple[dict[str, Any], bytes]:
            self._channel.send_bytes(json.dumps(request).encode())
            header = json.loads(self._channel.recv_bytes(_MOST_HEADER_BYTES))
            return header, self._channel.recv_bytes(self._most_bytes)

        return self._within(seconds, exchange)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _wait_until_ready(self) -> None:
        assert self._process.stderr
        with self._process.stderr as stderr:
            with suppress(_DiedError):
                if self._within(_START_SECONDS, self._channel.recv_bytes) is not None:
                    return
            said = stderr.read().decode(errors="replace").strip()
        self.kill()
        raise EngineError(f"the process that renders documents does not start: {said[-2000:]}")

    def _within(self, seconds: float, exchange: Any) -> Any:
        """What `exchange` gives. The child is killed when it is not over in time: nothing else
        ends a wait in the middle of a message."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(max(0.0, seconds), end)
        timer.start()
        try:
            return exchange()
        except (EOFError, OSError, ValueError) as error:
            if late.is_set():
                return None
            self._process.kill()
            code = self._process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise _DiedError(how) from error
        finally:
            timer.cancel()
