"""A channel between a coordinator and a process on another machine: TCP, both sides proven.

The coordinator opens a Door and tells the other side, by a way that is trusted, to `knock`.
"""

import os
import socket
import struct
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

# A machine that vanishes closes nothing. These end a channel to it after about so long, whether it
# is quiet (keepalive) or has sent what was never acknowledged.
SILENCE_SECONDS = 25
_PROBE_AFTER, _PROBE_EVERY = 10, 5

_PATIENCE = 5.0  # with who knocks and does not go on


class Door:
    """Listens on a free port at `host`, an address of this machine; use as a context.

    Only who knows `key` comes in, and the door proves that it does too.
    """

    def __init__(self, host: str) -> None:
        self.key = os.urandom(32)
        self._socket = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def open(self, seconds: float) -> Connection:
        """The first one who comes in. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            came, _ = self._socket.accept()
            _prepare(came)
            channel = Connection(came.detach())
            with suppress(AuthenticationError, AssertionError, EOFError, OSError):
                if channel.poll(_PATIENCE):
                    answer_challenge(channel, self.key)
                    deliver_challenge(channel, self.key)
                    return channel
            channel.close()


def knock(address: tuple[str, int], key: bytes, seconds: float) -> socket.socket:
    """The channel to the door at `address`, as a socket that a child process may inherit.

    Raises OSError, and AuthenticationError when the key is not the door's.
    """
    wire = socket.create_connection(address, timeout=seconds)
    _prepare(wire)
    channel = Connection(os.dup(wire.fileno()))
    with channel:
        deliver_challenge(channel, key)
        answer_challenge(channel, key)
    return wire


def limit_sends(channel: Connection, seconds: int) -> None:
    """From now on, sending raises BlockingIOError when not a byte is taken for so long."""
    # A write that has sent a part returns when the time is up; only the next one, after as long
    # again, fails.
    limit = struct.pack("ll", max(1, seconds // 2), 0)
    with socket.socket(fileno=os.dup(channel.fileno())) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _prepare(wire: socket.socket) -> None:
    wire.settimeout(None)
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, (SILENCE_SECONDS - _PROBE_AFTER) // _PROBE_EVERY),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000),
    ):
        wire.setsockopt(level, option, value)
