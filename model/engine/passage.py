"""The way of one microbatch's hidden states through a rank: in once, out once.

Shapes: T tokens of the microbatch, D hidden size.
"""

import torch
from torch import Tensor

from model.decoder import Decoder
from model.engine.plan import Plan
from model.engine.transport import Transport


class Passage:
    """What a rank owes its neighbours: one that is not served waits for ever, and one that is
    served twice takes the second for the next microbatch."""

    def __init__(
        self, transport: Transport, decoder: Decoder, dtype: torch.dtype, plan: Plan
    ) -> None:
        self._transport = transport
        self._shape = (plan.tokens, decoder.config.text.hidden_size)
        self._dtype = dtype
        self._receives = not decoder.is_first
        self._sends = not decoder.is_last

    def receive(self) -> Tensor | None:
        """hidden_TD of the rank before; None on the first rank, and once received."""
        if not self._receives:
            return None
        hidden_TD = self._transport.receive(*self._shape, self._dtype)
        self._receives = False
        return hidden_TD

    def send(self, hidden_TD: Tensor) -> None:
        self._transport.send(hidden_TD)
        self._sends = False

    def complete(self) -> None:
        """Receive and send what has not been, though it holds nothing of use."""
        self.receive()
        if self._sends:
            self.send(torch.zeros(self._shape, dtype=self._dtype, device=self._transport.device))
