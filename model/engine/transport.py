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

# Ranks wait for each other as long as it takes: one may load its weights for half an hour. That
# one has died is noticed by the coordinator, which ends the others.
_PATIENCE = timedelta(days=30)
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
    """One rank's links to the rank before and the rank after it."""

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
