"""What fetching needs to know. Picklable, and free of imports: it travels inside ReadSettings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FetchSettings:
    """allow_host: hosts that may be connected to though they are not public. seconds: for one
    file, all tries together. host_requests, host_rate: to one host, by one machine: requests at a
    time and in a second. endpoint_url: of S3.
    """

    allow_host: tuple[str, ...] = ()
    seconds: float = 60.0
    host_requests: int = 4
    host_rate: float = 20.0
    endpoint_url: str | None = None
