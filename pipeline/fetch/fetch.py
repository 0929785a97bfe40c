"""Many addresses at once, their bytes in the order asked for: http(s), stores, files."""

import tempfile
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import IO, NamedTuple, TypeVar
from urllib.parse import urljoin

from pipeline.fetch.http import HttpFetcher
from pipeline.fetch.settings import FetchSettings
from pipeline.formats.row import check_size, row_error
from pipeline.storage import PatientFile, open_fs, patiently
from schemas.errors import ConfigError, Reason, RowError

T = TypeVar("T")

AT_ONCE = 16
AHEAD = 32  # files that are fetched before the first of them is taken
IN_MEMORY = 2 * 1024**2  # of each file that waits; what is longer waits on disk

# Storage that an address may lead to. Others (ftp, sftp, webhdfs, a chain with ::) name hosts that
# fsspec connects to without any check.
_STORES = ("file", "local", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf")


class Fetched(NamedTuple):
    """What is at an address, in a file at its start, which is the caller's to close; or why there
    is nothing. Neither where nothing was asked for."""

    file: IO[bytes] | None = None
    error: RowError | None = None


class Fetcher:
    """Raises ConfigError for settings that are not usable."""

    def __init__(self, settings: FetchSettings, max_bytes: int) -> None:
        self._http = HttpFetcher(settings, max_bytes)
        self._max_bytes = max_bytes
        self._endpoint_url = settings.endpoint_url

    def fetch_all(
        self, wanted: Iterable[tuple[T, str | None]]
    ) -> Generator[tuple[T, Fetched], None, None]:
        """Each item with what is at its address, at most AHEAD of them fetched ahead, of which no
        more than IN_MEMORY each is in memory.
        """
        ahead: deque[tuple[T, Future[IO[bytes] | None]]] = deque()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for item, address in wanted:
                    ahead.append((item, pool.submit(self._fetch, address)))
                    if len(ahead) == AHEAD:
                        yield _taken(*ahead.popleft())
                while ahead:
                    yield _taken(*ahead.popleft())
            except BaseException:  # nobody wants the rest
                self._http.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch(self, address: str | None) -> IO[bytes] | None:
        """A file at its start. Raises RowError, OSError when the disk is full."""
        if address is None:
            return None
        with ExitStack() as closing:
            file = closing.enter_context(tempfile.SpooledTemporaryFile(IN_MEMORY))
            if protocol_of(address) in ("http", "https"):
                self._http.fetch(address, file)
            else:
                self._copy(address, file)
            file.seek(0)
            closing.pop_all()
        return file

    def _copy(self, address: str, into: IO[bytes]) -> None:
        protocol = protocol_of(address)
        if protocol and (protocol not in _STORES or "::" in address):
            raise row_error(
                Reason.BAD_ADDRESS,
                f"{address} is not read; expected http(s)://, a path, or one of "
                + ", ".join(f"{name}://" for name in _STORES),
            )
        try:
            fs, path = open_fs(address, self._endpoint_url)
        except ConfigError as error:
            raise row_error(Reason.BAD_ADDRESS, error) from error
        info = patiently(lambda: fs.info(path))
        if info["type"] != "file":  # a pipe, or /dev/zero, would never end
            raise row_error(Reason.BAD_ADDRESS, f"{path} is not a file")
        check_size(info["size"], self._max_bytes)
        with PatientFile(fs, path, cache_type="none") as file:
            while (size := into.tell()) < info["size"]:
                data = file.read(min(IN_MEMORY, info["size"] - size))
                if not data:
                    raise row_error(Reason.READ_ERROR, f"{path} became shorter while it was read")
                into.write(data)


def protocol_of(address: str) -> str | None:
    """What is before ://, in lower case; None for a path."""
    protocol, found, _ = address.partition("://")
    return protocol.lower() if found else None


def absolute(address: str, beside: str) -> str:
    """An address in a file at the address `beside`: a relative path starts at that one's folder."""
    if protocol_of(address) or address.startswith("/"):
        return address
    if protocol_of(beside) in ("http", "https"):
        return urljoin(beside, address)
    return f"{beside.rpartition('/')[0]}/{address}"


def _taken(item: T, future: "Future[IO[bytes] | None]") -> tuple[T, Fetched]:
    try:
        return item, Fetched(future.result())
    except RowError as error:
        return item, Fetched(error=error)
    except FileNotFoundError as error:
        return item, Fetched(error=row_error(Reason.NOT_FOUND, f"no such file: {error}"))
    except Exception as error:  # storage clients raise far more than OSError
        return item, Fetched(error=row_error(Reason.READ_ERROR, error))
