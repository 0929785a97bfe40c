"""Links through host memory for ranks that share a GPU: NCCL refuses two ranks on one.

All else of several ranks on GPUs can so be tested where there is only one.
"""

import torch
from torch import Tensor

from model.engine.transport import MeetingPoint, Transport


def link_through_host() -> None:
    """For the ranks of this process. Sending waits until the GPU has computed what is sent."""
    link, receive, send = Transport.__init__, Transport.receive, Transport.send
    devices: dict[Transport, torch.device] = {}

    def link_on_host(
        self: Transport, rank: int, ranks: int, device: torch.device, meeting_point: MeetingPoint
    ) -> None:
        devices[self] = device
        link(self, rank, ranks, torch.device("cpu"), meeting_point)

    def receive_to_device(
        self: Transport, tokens: int, hidden_size: int, dtype: torch.dtype
    ) -> Tensor:
        return receive(self, tokens, hidden_size, dtype).to(devices[self])

    def send_from_device(self: Transport, hidden_TD: Tensor) -> None:
        send(self, hidden_TD.cpu())

    Transport.__init__ = link_on_host
    Transport.receive = receive_to_device
    Transport.send = send_from_device
