"""The channel to a rank elsewhere: strangers stay out, nobody waits for ever, an end is seen."""

import socket
import struct
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

import pytest

from model.engine import channel
from model.engine.channel import SILENCE_SECONDS, Door, knock


def knocking(address, key, into: list) -> threading.Thread:
    def work() -> None:
        try:
            into.append(knock(address, key, 5.0))
        except Exception as error:
            into.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def connected(door: Door) -> tuple[Connection, socket.socket]:
    """The two ends of a channel: of who opened the door, and of who knocked."""
    came = []
    thread = knocking(door.address, door.key, came)
    ours = door.open(5.0)
    thread.join(timeout=5)
    return ours, came.pop()


def test_strangers_and_silent_ones_do_not_come_in_and_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(channel, "_PATIENCE", 0.2)
    with Door("127.0.0.1") as door:
        silent = socket.create_connection(door.address)
        talking = socket.create_connection(door.address)
        talking.sendall(b"GET / HTTP/1.1\r\n\r\n")
        came = []
        wrong = knocking(door.address, b"another key", came)
        with pytest.raises(TimeoutError):
            door.open(1.0)
        wrong.join(timeout=5)
        assert isinstance(came.pop(), AuthenticationError)

        right = knocking(door.address, door.key, came)
        ours = door.open(5.0)
        right.join(timeout=5)
        theirs = Connection(came.pop().detach())
        ours.send({"any": "thing"})
        assert theirs.recv() == {"any": "thing"}
        theirs.close()
        with pytest.raises(EOFError):
            ours.recv()
        silent.close()
        talking.close()


def test_nobody_comes_and_the_wait_ends():
    with Door("127.0.0.1") as door:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            door.open(0.2)
        assert time.monotonic() - started < 2
    with pytest.raises(ConnectionRefusedError):
        knock(door.address, door.key, 1.0)


def test_both_ends_notice_within_a_minute_that_the_other_machine_is_gone():
    """The kernel does the work; what it was told is what can be seen without unplugging a cable."""
    with Door("127.0.0.1") as door:
        ours, theirs = connected(door)
        ends = [socket.socket(fileno=ours.fileno()), theirs]
        for end in ends:
            tcp = [
                end.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE,
                    socket.TCP_KEEPINTVL,
                    socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                )
            ]
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert tcp[0] + tcp[1] * tcp[2] == SILENCE_SECONDS < 60
            assert tcp[3] == SILENCE_SECONDS * 1000
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert end.getblocking()
        ends[0].detach()
        ends[1].close()


def test_an_end_that_was_cut_off_is_an_error_of_the_channel():
    with Door("127.0.0.1") as door:
        ours, end = connected(door)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()  # a reset, as of a machine that came up again
        with pytest.raises((EOFError, OSError)):
            ours.recv()
