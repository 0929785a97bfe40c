"""What a rank process does with its messages once it is ready: compute, pass on, tell.

Knows neither how messages come nor how hidden states travel.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from model.engine.messages import Forget, Forgotten, OutOfMemory
from model.engine.microbatch import Image, Microbatch
from model.engine.passage import Passage
from model.engine.progress import Progress
from model.engine.rank import Rank
from model.engine.transport import Transport


class RankLoop:
    """Takes messages in order, for ever. next_message: waits for one. tell: to the coordinator.

    Out of memory, a rank takes no further part in what is in flight, but its neighbours still wait
    for the hidden states of each of these microbatches. So it tells the coordinator, waits for
    Forget, which follows the last of them, and only then passes all of them on uncomputed. Any
    token that comes of such a microbatch thus reaches a coordinator that expects nothing but
    Forgotten, whatever ways the messages of the ranks take.
    """

    def __init__(
        self,
        rank: Rank,
        transport: Transport,
        next_message: Callable[[], Any],
        tell: Callable[[Any], None],
        progress: Progress,
    ) -> None:
        self._rank = rank
        self._transport = transport
        self._next_message = next_message
        self._tell = tell
        self._progress = progress
        self._clock = progress.follow(rank.decoder, rank.device)
        self._passage: Passage | None = None  # of the newest microbatch

    @torch.inference_mode()
    def run(self) -> NoReturn:
        while True:
            self._progress.at("idle", waits=True)
            message = self._next_message()
            try:
                self._take(message)
                continue
            except torch.OutOfMemoryError as error:
                shortage = str(error)  # without its frames, which hold what is to be freed
            self._sit_out(shortage)

    def _take(self, message: Any) -> None:
        if isinstance(message, Image):
            self._progress.at("computing an image")
            with self._clock.computing():
                self._rank.take_image(message)
        elif isinstance(message, Microbatch):
            self._compute(message)
        else:
            assert isinstance(message, Forget)
            self._forget()

    def _compute(self, microbatch: Microbatch) -> None:
        rank, plan = self._rank, microbatch.plan
        self._passage = passage = self._passage_of(microbatch)
        at, this = self._progress.at, f"microbatch {plan.number}"
        at(f"computing {this}")
        rank.swap(plan)
        at(f"waiting for {this} of the rank before", waits=True)
        received = passage.receive()
        at(f"computing {this}")
        with self._clock.computing():
            hidden_TD = rank.embed(microbatch) if received is None else received
            hidden_TD = rank.forward(hidden_TD, plan)
            scored = rank.score(hidden_TD, microbatch) if rank.decoder.is_last else None
        if scored is None:
            at(f"handing {this} to the rank after", waits=True)
            passage.send(hidden_TD)
            return
        # They are the next message, and were computed on the way of the microbatch through ranks.
        masks = self._next_message() if microbatch.constrained else None
        with self._clock.computing():
            sampled = rank.sample(scored, masks)
        at(f"waiting for its GPU to finish {this}", waits=True)
        self._tell(sampled.wait())

    def _sit_out(self, shortage: str) -> None:
        self._tell(OutOfMemory(shortage))
        self._progress.at("waiting for word that it need not go on, out of memory", waits=True)
        passages = [self._passage] if self._passage else []
        while not isinstance(message := self._next_message(), Forget):
            if isinstance(message, Microbatch):
                passages.append(self._passage_of(message))
        self._rank.forget()
        for passage in passages:
            passage.complete()
        self._forget()

    def _forget(self) -> None:
        self._rank.forget()
        self._passage = None
        self._tell(Forgotten())

    def _passage_of(self, microbatch: Microbatch) -> Passage:
        return Passage(self._transport, self._rank.decoder, self._rank.dtype, microbatch.plan)
