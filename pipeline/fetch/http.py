"""One http(s) address into a file, whatever its server does: limits of time, bytes and redirects,
every hop's host checked, and more tries where another may help.

Speaks through urllib3; the sockets are opened here, to the addresses that were checked. One
connection a file: a machine asks for a few files a second. No proxies: what a proxy connects to
cannot be checked here.
"""

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from importlib.metadata import version
from itertools import count
from random import random
from typing import IO, NamedTuple
from urllib.parse import unquote, urljoin

from urllib3 import BaseHTTPResponse, Retry
from urllib3.connection import HTTPConnection
from urllib3.exceptions import InvalidHeader, LocationParseError, ReadTimeoutError
from urllib3.util import Url, make_headers, parse_url

from pipeline.fetch.hosts import Hosts
from pipeline.fetch.settings import FetchSettings
from pipeline.fetch.turns import Turns
from pipeline.formats.row import check_size, row_error
from schemas.errors import Reason, RowError

ATTEMPTS = 4
FIRST_WAIT_S = 1.0  # doubled after every attempt
REDIRECTS = 5
_CONNECT_S = 10.0
_QUIET_S = 30.0  # longest wait for the next bytes of an answer
_CONNECTIONS = 3  # addresses of a host that are tried
_BLOCK_BYTES = 64 * 1024
_PORTS = {"http": 80, "https": 443}
_MOVED = (301, 302, 303, 307, 308)
_GONE = (404, 410)
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # another try may be answered
_PAUSING = (429, 503)  # a Retry-After is then meant for all requests
_FINAL_ERRORS = (ssl.SSLCertVerificationError, UnicodeError)
_USER_AGENT = f"vl01-batch/{version('vl01-batch')}"


class HttpFetcher:
    """To be used by many threads. Raises ConfigError for an --allow-host that is none."""

    def __init__(self, settings: FetchSettings, max_bytes: int) -> None:
        self._seconds = settings.seconds
        self._max_bytes = max_bytes
        self._hosts = Hosts(settings.allow_host)
        self._turns = Turns(settings.host_requests, settings.host_rate)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends the waits between tries."""
        self._stopped.set()

    def fetch(self, address: str, into: IO[bytes]) -> None:
        """Raises RowError. The time runs from the first turn at the host: waiting for it is no
        fault of the file."""
        clock = _Clock(self._seconds)
        for attempt in count(1):
            try:
                self._follow(address, into, clock)
                return
            except _PassingError as error:
                wait = max(error.wait, FIRST_WAIT_S * 2 ** (attempt - 1) * (0.5 + random()))
                if attempt == ATTEMPTS or wait > clock.left or self._stopped.wait(wait):
                    tries = f" ({attempt} tries)" if attempt > 1 else ""
                    raise row_error(error.reason, error.message + tries) from error
            into.seek(0)
            into.truncate()

    def _follow(self, address: str, into: IO[bytes], clock: "_Clock") -> None:
        """One try, as far as redirects lead."""
        for _ in range(REDIRECTS + 1):
            target = _parse(address)
            with self._turns.take(target.host):
                clock.start()
                location = self._request(target, into, clock)
            if location is None:
                return
            address = urljoin(target.url.url, location)
        raise row_error(Reason.HTTP_ERROR, f"more than {REDIRECTS} redirects, at last to {address}")

    def _request(self, target: "_Target", into: IO[bytes], clock: "_Clock") -> str | None:
        """The body of an answer into the file, or where it redirects to."""
        try:
            with (
                closing(self._connect(target, clock)) as connection,
                clock.cutting(connection.sock),
            ):
                path, headers = target.url.request_uri, _headers(target.url)
                connection.request("GET", path, headers=headers, preload_content=False)
                response = connection.getresponse()
                if response.status in _MOVED and "Location" in response.headers:
                    return response.headers["Location"]
                self._check_status(response, target)
                self._copy(response, into)
        except RowError:
            raise
        except Exception as error:  # of urllib3, http.client, ssl and socket
            clock.check()
            quiet = isinstance(error, (TimeoutError, ReadTimeoutError))
            reason = Reason.TIMEOUT if quiet else Reason.READ_ERROR
            failed = row_error(reason, f"{type(error).__name__}: {error}")
            if isinstance(error, _FINAL_ERRORS) or _is_unknown_name(error):
                raise failed from error
            raise _PassingError(failed) from error
        clock.check()  # a connection that was cut looks like the end of an answer without a length
        return None

    def _connect(self, target: "_Target", clock: "_Clock") -> HTTPConnection:
        """A connection to a checked address of the host, its certificate checked for the name."""
        host, port = target.host, target.port
        connection = HTTPConnection(host, port, timeout=min(_QUIET_S, self._seconds))
        connection.sock = _open_socket(self._hosts, host, port, clock)
        if target.url.scheme == "https":
            try:
                connection.sock = self._tls.wrap_socket(connection.sock, server_hostname=host)
            except BaseException:
                connection.close()
                raise
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def _check_status(self, response: BaseHTTPResponse, target: "_Target") -> None:
        status = response.status
        if status in (200, 203):
            return
        reason = Reason.NOT_FOUND if status in _GONE else Reason.HTTP_ERROR
        error = row_error(reason, f"HTTP {status} {response.reason or ''} from {target.host}")
        if status not in _PASSING:
            raise error
        wait = _retry_after(response)
        if status in _PAUSING and wait:
            self._turns.pause(target.host, wait)
        raise _PassingError(error, wait)

    def _copy(self, response: BaseHTTPResponse, into: IO[bytes]) -> None:
        """Counts the bytes as they come, unpacked: what a header says of them may be a lie."""
        length = response.headers.get("Content-Length", "")
        if length.isdecimal():
            check_size(int(length), self._max_bytes)
        size = 0
        while data := response.read(_BLOCK_BYTES):
            size += len(data)
            if size > self._max_bytes:
                raise row_error(
                    Reason.TOO_MANY_BYTES,
                    f"still going on after {self._max_bytes:,} bytes (--max-bytes)",
                )
            into.write(data)


class _Target(NamedTuple):
    """An address taken apart. host: without the brackets of IPv6."""

    url: Url
    host: str
    port: int


class _PassingError(RowError):
    """An error that another try may not meet. wait: seconds that the server asks for."""

    def __init__(self, error: RowError, wait: float = 0.0) -> None:
        super().__init__(error.reason, error.message)
        self.wait = wait


class _Clock:
    """The time for one file."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end: float | None = None

    def start(self) -> None:
        """Of no effect once it runs."""
        self._end = self._end or time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        return self._seconds if self._end is None else self._end - time.monotonic()

    def check(self) -> None:
        """Raises RowError when the time is over."""
        if self.left <= 0:
            raise row_error(
                Reason.TIMEOUT, f"not there whole after {self._seconds:g} s (--fetch-seconds)"
            )

    @contextmanager
    def cutting(self, sock: socket.socket) -> Iterator[None]:
        """Cuts the connection when the time is over, also while a byte now and then keeps every
        single read from timing out."""
        # A second handle stays valid when TLS or http closes its own.
        with closing(socket.socket(fileno=os.dup(sock.fileno()))) as wire:
            timer = threading.Timer(max(0.0, self.left), _cut, [wire])
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
                timer.join()


def _cut(wire: socket.socket) -> None:
    with suppress(OSError):  # the server was faster
        wire.shutdown(socket.SHUT_RDWR)


def _open_socket(hosts: Hosts, host: str, port: int, clock: _Clock) -> socket.socket:
    failure: OSError | None = None
    for endpoint in hosts.resolve(host, port)[:_CONNECTIONS]:
        clock.check()
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
        try:
            sock.settimeout(min(_CONNECT_S, clock.left))
            sock.connect(endpoint.sockaddr)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure or OSError(f"{host} has no address")


def _parse(address: str) -> _Target:
    """Raises RowError."""
    try:
        url = parse_url(address)
    except LocationParseError as error:
        raise row_error(Reason.BAD_ADDRESS, f"not an address: {error}") from error
    if url.scheme not in _PORTS or not url.host:
        raise row_error(Reason.BAD_ADDRESS, f"not an address at an http server: {address}")
    return _Target(url, url.host.strip("[]"), url.port or _PORTS[url.scheme])


def _headers(url: Url) -> dict[str, str]:
    headers = {"Host": url.netloc or "", "User-Agent": _USER_AGENT, "Accept": "*/*"}
    headers |= {"Accept-Encoding": "identity", "Connection": "close"}
    return headers | (make_headers(basic_auth=unquote(url.auth)) if url.auth else {})


def _retry_after(response: BaseHTTPResponse) -> float:
    try:
        return Retry().get_retry_after(response) or 0.0
    except (InvalidHeader, ValueError, OverflowError):  # nonsense
        return 0.0


def _is_unknown_name(error: Exception) -> bool:
    return isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
