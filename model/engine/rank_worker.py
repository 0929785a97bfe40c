"""The process of one rank: `python -m model.engine.rank_worker FD`, started by a RankHost.

Takes messages from the socket FD in order. Ends with its coordinator, however that ends.
"""

import logging
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from model.child import die_with_parent
from model.engine.memory import Capacity
from model.engine.messages import AreYouThere, Failed, Ready, Start
from model.engine.progress import Progress
from model.engine.rank import Rank
from model.engine.rank_loop import RankLoop
from model.engine.transport import Transport
from schemas.errors import ConfigError


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the coordinator decides
    coordinator = Coordinator(Connection(int(sys.argv[1])))
    try:
        _serve(coordinator)
    except ConfigError as error:
        coordinator.tell(error)
    except BaseException:
        coordinator.tell(Failed(traceback.format_exc()))
    # Not sys.exit: threads of torch.distributed may be waiting for a rank that is gone.
    os._exit(1)


class Coordinator:
    """What is heard from it and told to it.

    A thread takes messages out of the channel at once, so that the coordinator never waits to
    send, and answers whether this rank is there, whatever the rank is at. It ends the process when
    the coordinator closes the channel or is no more, and when a message cannot be read.
    """

    def __init__(self, channel: Connection) -> None:
        self.progress = Progress()
        self._channel = channel
        self._telling = threading.Lock()
        self._messages: SimpleQueue = SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next_message(self) -> Any:
        return self._messages.get()

    def tell(self, message: Any) -> None:
        with self._telling:
            self._channel.send(message)

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.recv()
                if isinstance(message, AreYouThere):
                    self.tell(self.progress.alive())
                else:
                    self._messages.put(message)
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:
            self.tell(Failed(traceback.format_exc()))
            os._exit(1)


def _serve(coordinator: Coordinator) -> None:
    start: Start = coordinator.next_message()
    logging.basicConfig(level=start.log_level, format="%(asctime)s %(name)s: %(message)s")
    config, progress = start.config, coordinator.progress
    torch.set_num_threads(config.threads_per_rank)
    device = config.rank_device(start.gpu)
    progress.at("meeting the others")
    transport = Transport(start.rank, config.ranks, device, start.meeting_point)
    progress.at("loading its layers")
    rank = Rank(config, start.rank, device, progress.at)
    coordinator.tell(rank.room())
    capacity: Capacity = coordinator.next_message()
    rank.allocate(capacity)
    coordinator.tell(Ready())
    RankLoop(rank, transport, coordinator.next_message, coordinator.tell, progress).run()


if __name__ == "__main__":
    main()
