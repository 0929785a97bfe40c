"""An http server on this machine that serves files and misbehaves in every way asked of it."""

import gzip
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


@dataclass
class Site:
    """What is served, by path. asked: the requests so far; most: how many there were at once."""

    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, float]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0  # that each answer takes
    now: int = 0
    most: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def times(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        with site.lock:
            site.asked.append((self.path, time.monotonic()))
            site.headers.append({name.lower(): value for name, value in self.headers.items()})
            site.now += 1
            site.most = max(site.most, site.now)
        try:
            time.sleep(site.seconds)
            if answer := site.answers.get(self.path):
                answer(self)
            elif (data := site.files.get(self.path)) is not None:
                self.answer(200, data)
            else:
                self.answer(404, b"no such file")
        except OSError:
            pass  # the client had enough
        finally:
            with site.lock:
                site.now -= 1

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Not on the screen."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Not on the screen either."""


@contextmanager
def serve(
    files: dict[str, bytes] | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[Site]:
    site = Site(dict(files or {}))
    server = _Server(("127.0.0.1", 0), type("Mine", (Handler,), {"site": site}))
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    server.block_on_close = False
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# Ways to misbehave


def hang(handler: Handler) -> None:
    """Takes the request and never says a word."""
    time.sleep(30)


def drip_body(handler: Handler) -> None:
    """A byte now and then, of an answer that has no end."""
    handler.answer(200, b"begin", Content_Length="")
    while True:
        handler.wfile.write(b".")
        time.sleep(0.05)


def drip_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        handler.wfile.write(b".")
        handler.wfile.flush()
        time.sleep(0.05)


def flood(handler: Handler) -> None:
    """As many bytes as are taken, without saying how many."""
    handler.answer(200, b"", Content_Length="")
    while True:
        handler.wfile.write(bytes(1024**2))


def flood_in_chunks(handler: Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.answer(200, b"", Content_Length="", Transfer_Encoding="chunked")
    while True:
        handler.wfile.write(b"100000\r\n" + bytes(1024**2) + b"\r\n")


def promise_more(handler: Handler) -> None:
    handler.answer(200, b"short", Content_Length="1000")


def promise_less(handler: Handler) -> None:
    """Says ten bytes and sends a million."""
    handler.answer(200, bytes(10**6), Content_Length="10")


def bomb() -> Answer:
    """A megabyte that unpacks to one gigabyte."""
    packed = gzip.compress(bytes(1024**2)) * 1024
    return lambda handler: handler.answer(200, packed, Content_Encoding="gzip")


def redirect(location: str, status: int = 302) -> Answer:
    return lambda handler: handler.answer(status, b"", Location=location)


def fail_then(failures: int, status: int, data: bytes, **headers: str) -> Answer:
    """So many answers with a status, then the data."""
    left = [failures]

    def answer(handler: Handler) -> None:
        left[0] -= 1
        if left[0] >= 0:
            handler.answer(status, b"later", **headers)
        else:
            handler.answer(200, data)

    return answer
