"""How hidden states travel from rank to rank: torch.distributed, in order, none skipped.

Shapes: T tokens of a microbatch, D hidden size.
"""

import os
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from schemas.errors import EngineError

# Ranks wait for each other as long as it takes: one may load its weights for half an hour. That
# one has died is noticed by the coordinator, which ends the others.
_PATIENCE = timedelta(days=30)
_TO_LINK = timedelta(minutes=5)
_SENDS_IN_FLIGHT = 2

# Where ranks find each other: a file that all can open, or an address that all can reach.
MeetingPoint = Path | tuple[str, int]


class Meeting:
    """Lets ranks find each other at its `point` while it lives.

    host: None, or the address of this machine for ranks on others, which listens on a free port.
    """

    def __init__(self, host: str | None) -> None:
        self.point: MeetingPoint
        if host is None:
            # A file without a name, which leaves nothing however this process ends.
            self._file = os.fdopen(os.memfd_create("vl01-ranks"))
            self.point = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        else:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self.point = host, self._store.port


class Transport:
    """One rank's links to the rank before and the rank after it, made on construction.

    Raises EngineError when they cannot be: GPUs that do not reach each other, or no neighbour.
    """

    def __init__(
        self, rank: int, ranks: int, device: torch.device, meeting_point: MeetingPoint
    ) -> None:
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=_store(meeting_point, ranks),
            rank=rank,
            world_size=ranks,
            timeout=_PATIENCE,
        )
        self._rank = rank
        self.device = device
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()
        try:
            self._link(ranks)
        except RuntimeError as error:
            raise EngineError(
                f"rank {rank} of {ranks} has no link to its neighbours: {error}. For GPUs, "
                "NCCL_DEBUG=INFO shows what was tried; where it stops, try NCCL_P2P_DISABLE=1."
            ) from error

    def _link(self, ranks: int) -> None:
        """A number over each link. NCCL makes a link only then, out of GPU memory that would else
        be taken for free. It waits for both ranks, so every other one begins with its other link.
        """
        work, number = [], torch.zeros(1, device=self.device)
        ways = [(dist.isend, self._rank + 1), (dist.irecv, self._rank - 1)]
        for go, neighbour in ways if self._rank % 2 == 0 else reversed(ways):
            if 0 <= neighbour < ranks:
                work.append(go(number, neighbour))
        for each in work:
            each.wait(_TO_LINK)

    def receive(self, tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """The next hidden_TD of the rank before."""
        hidden_TD = torch.empty(tokens, hidden_size, dtype=dtype, device=self.device)
        dist.recv(hidden_TD, src=self._rank - 1)
        return hidden_TD

    def send(self, hidden_TD: Tensor) -> None:
        """Hand hidden_TD to the rank after, which may still be busy with an earlier one."""
        hidden_TD = hidden_TD.contiguous()
        work = dist.isend(hidden_TD, dst=self._rank + 1)
        assert work is not None
        # The tensor must live until it is sent.
        self._sends.append((work, hidden_TD))
        if len(self._sends) > _SENDS_IN_FLIGHT:
            self._sends.popleft()[0].wait()


def _store(meeting_point: MeetingPoint, ranks: int) -> Store:
    if isinstance(meeting_point, Path):
        return FileStore(str(meeting_point), ranks)
    return TCPStore(*meeting_point, is_master=False)
