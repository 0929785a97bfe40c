"""The process of one rank: `python -m model.engine.rank_worker FD`, started by a RankHost.

Takes messages from the socket FD in order. Ends with its coordinator, however that ends.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from model.engine.memory import Capacity
from model.engine.messages import Failed, Ready, Start
from model.engine.rank import Rank
from model.engine.rank_loop import RankLoop
from model.engine.transport import Transport
from schemas.errors import ConfigError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the coordinator decides
    channel = Connection(int(sys.argv[1]))
    try:
        _serve(channel, _inbox(channel))
    except ConfigError as error:
        channel.send(error)
    except BaseException:
        channel.send(Failed(traceback.format_exc()))
    # Not sys.exit: threads of torch.distributed may be waiting for a rank that is gone.
    os._exit(1)


def _inbox(channel: Connection) -> Callable[[], Any]:
    """Takes messages out of the channel at once, so that the coordinator never waits to send.

    Ends the process when the coordinator closes the channel or is no more, and when a message
    cannot be read.
    """
    messages: SimpleQueue = SimpleQueue()

    def read() -> None:
        try:
            while True:
                messages.put(channel.recv())
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:
            channel.send(Failed(traceback.format_exc()))
            os._exit(1)

    threading.Thread(target=read, name="inbox", daemon=True).start()
    return messages.get


def _serve(channel: Connection, next_message: Callable[[], Any]) -> None:
    start: Start = next_message()
    logging.basicConfig(level=start.log_level, format="%(asctime)s %(name)s: %(message)s")
    config = start.config
    torch.set_num_threads(config.threads_per_rank)
    device = config.rank_device(start.gpu)
    transport = Transport(start.rank, config.ranks, device, start.meeting_point)
    rank = Rank(config, start.rank, device)
    channel.send(rank.room())
    capacity: Capacity = next_message()
    rank.allocate(capacity)
    channel.send(Ready())
    RankLoop(rank, transport, next_message, channel.send).run()


if __name__ == "__main__":
    main()
