"""Which hosts may be connected to. A list of addresses comes from anywhere: what it names must not
reach into this machine's own network. Knows names, addresses and ports, no HTTP.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

from pipeline.formats.row import row_error
from schemas.errors import ConfigError, Reason

_NAME_AND_PORT = re.compile(r"(\[[^\]]*\]|[^:]*):(\d{1,5})")
_NAME = re.compile(r"\w([\w.-]*[\w.])?")
# NAT64 (RFC 6052): a gateway sends these on to the IPv4 address in their last 32 bits.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# A public address that machines on Azure, and nobody else, find their host's own service at.
_AZURE = ipaddress.ip_address("168.63.129.16")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Endpoint(NamedTuple):
    """One of the addresses of a host, as `socket` wants it."""

    family: int
    sockaddr: tuple[Any, ...]


class _Rule(NamedTuple):
    """What one --allow-host allows: a name, or a network; at every port, or at one."""

    name: str | None
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
    port: int | None


class Hosts:
    """Public hosts, and those that the user allows: `files.corp`, `files.corp:8080`, `127.0.0.1`,
    `[::1]:80`, `10.0.0.0/8`. Raises ConfigError for what is none of these.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._rules = [_rule(text) for text in allowed]

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        """Every address of a host, each one checked. To connect to one of these, and not to the
        name once more, leaves no moment at which the name could come to mean another.

        Raises RowError when one of them is not allowed, OSError when there are none.
        """
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise row_error(Reason.BAD_ADDRESS, f"no name of a host: {error}") from error
        if not any(rule.name == _plain(host) and _fits(rule, port) for rule in self._rules):
            for *_, sockaddr in found:
                self._check(host, str(sockaddr[0]), port)
        return [Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found]

    def _check(self, host: str, text: str, port: int) -> None:
        address = ipaddress.ip_address(text)
        if is_public(address):
            return
        if any(
            rule.network and address in rule.network and _fits(rule, port) for rule in self._rules
        ):
            return
        leads = "" if text == host else f" leads to {text}, which"
        raise row_error(
            Reason.HOST_REFUSED,
            f"{host}{leads} is not on the public internet (--allow-host {host} allows it)",
        )


def is_public(address: _Address) -> bool:
    """Whether an address is one of the public internet, also if it wraps an IPv4 one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None and not is_public(address.sixtofour):
            return False
    return address.is_global and not address.is_multicast and address != _AZURE


def _rule(text: str) -> _Rule:
    match = _NAME_AND_PORT.fullmatch(text)
    host, port = (match[1], int(match[2])) if match else (text, None)
    host = host.removeprefix("[").removesuffix("]")
    try:
        return _Rule(None, ipaddress.ip_network(host, strict=False), port)
    except ValueError:
        if not _NAME.fullmatch(host) or (port or 0) > 65535:
            raise ConfigError(
                f"--allow-host is {text!r}; expected a host, host:port, an IP address or a network"
                " such as 10.0.0.0/8"
            ) from None
    return _Rule(_plain(host), None, port)


def _fits(rule: _Rule, port: int) -> bool:
    return rule.port in (None, port)


def _plain(host: str) -> str:
    return host.lower().removesuffix(".")
