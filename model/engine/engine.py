"""Requests in, results out: continuous batching over one or more ranks.

Owns what the others do not know: the requests themselves and their text.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType

import numpy as np

from model.config import load_config
from model.decoder import Decoder
from model.engine.answer import Answer
from model.engine.check_request import check_request
from model.engine.config import EngineConfig
from model.engine.constraint import Constraint, Constraints
from model.engine.live import Live
from model.engine.memory import Memory
from model.engine.messages import Alive
from model.engine.microbatch import Image, Microbatch, Sampled
from model.engine.plan import Plan
from model.engine.rank_host import Hosts
from model.engine.rank_in_process import RankInProcess
from model.engine.rank_processes import RankProcesses
from model.engine.ranks import layer_spans
from model.engine.sampling import Masks
from model.engine.scheduler import Scheduler
from model.layers.ragged import BLOCK_TOKENS
from model.tokenizer import Tokenizer
from schemas.errors import EngineError, OutOfMemoryError
from schemas.requests import Request, Result

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStatistics:
    """Counts since the start. prompt_tokens and output_tokens: computed and written so far."""

    microbatches: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True)
class Occupancy:
    """How full the engine is. slots, blocks: shares of its memory that are in use, 0 to 1."""

    running: int  # sequences that hold memory
    slots: float
    blocks: float


class Engine:
    """Generates for many requests at once. Not thread-safe: one thread calls all methods.

    Raises ConfigError (CheckpointError) when it cannot be set up as asked. After an EngineError
    an engine is of no more use; close it.

    hosts: of its ranks, where these are several; None is this machine.
    at: is told in words, again and again, how far a rank that is waited for is in starting.
    """

    def __init__(
        self,
        config: EngineConfig,
        hosts: Hosts | None = None,
        at: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model = load_config(config.checkpoint)
        self._tokenizer = Tokenizer.from_checkpoint(config.checkpoint)
        layer_spans(self._model, config.ranks)
        if hosts is None:
            config.check_devices()
        self._ranks = (
            RankInProcess(config, at) if config.ranks == 1 else RankProcesses(config, hosts, at)
        )
        self.capacity = self._ranks.capacity
        self._config = config
        self._statistics = EngineStatistics()
        self._start(config.chunk_tokens)
        self._constraints: Constraints | None = None
        self._threads = config.threads_per_rank

    @property
    def unfinished(self) -> int:
        """Requests added and not yet answered."""
        return len(self._live)

    @property
    def rank_pids(self) -> list[int]:
        """The process of each rank; this one when there is only one."""
        return self._ranks.pids

    @property
    def statistics(self) -> EngineStatistics:
        preemptions = self._statistics.preemptions + self._scheduler.preemptions
        return replace(self._statistics, preemptions=preemptions)

    @property
    def rank_busy_seconds(self) -> tuple[float, ...]:
        """That each rank has computed so far; of ranks in other processes some seconds old."""
        return self._ranks.busy_seconds

    @property
    def alive(self) -> Alive:
        """What is done in this process, by the only rank or by the coordinator of several: `step`
        finds out when one of these hangs. May be asked by any thread while another is in `step`."""
        return self._ranks.alive

    @property
    def decoder(self) -> Decoder | None:
        """The layers, where the only rank is in this process; for experiments with them."""
        return self._ranks.decoder if isinstance(self._ranks, RankInProcess) else None

    @property
    def occupancy(self) -> Occupancy:
        memory, capacity = self._memory, self.capacity
        return Occupancy(
            running=self._scheduler.running,
            slots=1 - memory.free_slots / capacity.slots,
            blocks=1 - memory.free_blocks / capacity.blocks,
        )

    def add(self, request: Request) -> None:
        """Queue a request; `step` will answer it.

        Raises RowError (PROMPT_TOO_LONG) when it can never fit, ConfigError when no answer can be
        held to its JSON Schema, and ValueError when it contradicts itself: no tokens, an id that no
        token has, or an image with another number of image tokens or tiles.
        """
        check_request(request, self._model)
        constraint = self._constraint(request.sampling.json_schema)
        prompt_tokens = len(request.token_ids)
        key = self._scheduler.add(prompt_tokens, request.sampling.max_new_tokens)
        answer = Answer(request.sampling, self._model.eos_token_ids, self._tokenizer.decode)
        self._live[key] = Live(request, answer, constraint)

    def step(self) -> list[Result]:
        """Schedule and run microbatches until the ranks are full; record the oldest.

        Returns the requests that it finished; none, at once, when there is nothing to do. When a
        GPU runs out of memory, all requests start over in microbatches of half the size; raises
        OutOfMemoryError when those are the smallest.
        """
        try:
            return self._advance()
        except OutOfMemoryError as error:
            if self._chunk_tokens < 4 * BLOCK_TOKENS:
                raise OutOfMemoryError(
                    f"{error}; microbatches of {self._chunk_tokens} tokens cannot be halved again: "
                    "use more ranks or a smaller cache_bytes"
                ) from error
            shortage = str(error)  # without its frames, which hold what is to be freed
        self._start_over(shortage)
        return []

    def _advance(self) -> list[Result]:
        while plan := self._scheduler.schedule():
            self._submit(plan)
            self._send_masks()
        if self._in_flight:
            results = self._record(self._in_flight.popleft(), self._ranks.receive())
            self._send_masks()
            return results
        if self._live:
            raise EngineError(f"{len(self._live)} requests are unfinished and none can go on")
        return []

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        """The results of all requests, as they are finished. Reads no further than it needs to
        keep the engine full. Raises what `add` and `step` raise."""
        requests = iter(requests)
        while True:
            for request in islice(requests, max(0, 2 * self.capacity.slots - self.unfinished)):
                self.add(request)
            if not self.unfinished:
                return
            yield from self.step()

    def close(self) -> None:
        """End the ranks; their processes are gone within seconds."""
        self._ranks.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, chunk_tokens: int) -> None:
        """With no sequence in memory and none in flight."""
        self._chunk_tokens = chunk_tokens
        self._memory = Memory(self.capacity)
        self._scheduler = Scheduler(
            self._memory,
            chunk_tokens=chunk_tokens,
            microbatches=self._config.ranks,
            ahead=self._config.plans_ahead,
        )
        self._live: dict[int, Live] = {}
        self._in_flight: deque[Plan] = deque()
        self._unmasked: deque[Plan] = deque()  # in flight, constrained and without their masks

    def _start_over(self, shortage: str) -> None:
        """Compute the unfinished requests again: a microbatch that failed half way has left their
        memory in between. Their seeds write the same tokens again."""
        logger.warning(
            "%s; going on with chunk_tokens %d instead of %d",
            shortage,
            self._chunk_tokens // 2,
            self._chunk_tokens,
        )
        self._ranks.forget()
        unfinished = [live.request for live in self._live.values()]
        self._statistics = self.statistics
        self._start(self._chunk_tokens // 2)
        for request in unfinished:
            self.add(request)

    def _constraint(self, json_schema: str | None) -> Constraint | None:
        if json_schema is None:
            return None
        if self._constraints is None:  # takes a second; most runs have no use for it
            self._constraints = Constraints(
                self._tokenizer.serialize(),
                self._model.text.vocab_size,
                self._model.eos_token_ids,
                self._threads,
            )
        return self._constraints.start(json_schema)

    def _submit(self, plan: Plan) -> None:
        microbatch = self._microbatch(plan)
        self._ranks.submit(self._take_images(plan), microbatch)
        self._in_flight.append(plan)
        if microbatch.constrained:
            self._unmasked.append(plan)

    def _send_masks(self) -> None:
        """To the constrained microbatches of which all earlier tokens are known.

        The ranks compute all but the choice of tokens without them. When a microbatch is planned
        ahead, they do so while the host waits for the tokens of the one before and then computes
        these masks.
        """
        while self._unmasked and self._knows_all_before(self._unmasked[0]):
            self._ranks.constrain(self._masks(self._unmasked.popleft()))

    def _knows_all_before(self, plan: Plan) -> bool:
        return all(
            live.knows_all_before(segment)
            for segment in plan.sampling_segments
            if (live := self._live.get(segment.sequence)) and live.constraint
        )

    def _masks(self, plan: Plan) -> Masks:
        """Of the constrained sequences in the microbatch, less those that ended meanwhile."""
        assert self._constraints
        wanted = {
            row: live.constraint
            for row, segment in enumerate(plan.sampling_segments)
            if (live := self._live.get(segment.sequence)) and live.constraint
        }
        bits_CW = self._constraints.masks(list(wanted.values()), self._ranks.room_for_masks)
        return Masks(plan.number, tuple(wanted), bits_CW)

    def _take_images(self, plan: Plan) -> list[Image]:
        images = []
        for segment in plan.segments:
            live = self._live[segment.sequence]
            if (tiles := live.tiles_to_send) is not None:
                assert live.request.image_size is not None
                images.append(Image(segment.sequence, tiles, live.request.image_size))
                live.tiles_to_send = None
        return images

    def _microbatch(self, plan: Plan) -> Microbatch:
        computed = [(self._live[segment.sequence], segment) for segment in plan.segments]
        decoded = [live.token(segment) for live, segment in computed if segment.is_decode]
        chunks = [live.chunk(segment) for live, segment in computed if not segment.is_decode]
        sampling = [(live, segment) for live, segment in computed if segment.samples]
        return Microbatch(
            plan,
            np.concatenate([np.array(decoded, dtype=np.int32), *chunks], dtype=np.int32),
            tuple(live.draw(segment) for live, segment in sampling),
            constrained=any(live.constraint for live, _ in sampling),
        )

    def _record(self, plan: Plan, sampled: Sampled) -> list[Result]:
        assert sampled.number == plan.number
        self._scheduler.record(plan)
        written: dict[int, int] = {}  # sequence -> token
        for segment, token, logprob in zip(
            plan.sampling_segments, sampled.token_ids, sampled.logprobs, strict=True
        ):
            if live := self._live.get(segment.sequence):  # else it ended meanwhile
                live.answer.append(token, logprob)
                written[segment.sequence] = token
        ended = self._ended(written)
        for key in ended:
            self._scheduler.finish(key)
        self._count(plan, len(written))
        return [self._live.pop(key).result() for key in ended]

    def _ended(self, written: dict[int, int]) -> list[int]:
        """The sequences that do not go on after these tokens. Tells the constraints of the rest."""
        held: dict[int, Constraint] = {}
        ended = []
        for key in written:
            live = self._live[key]
            if live.answer.finish_reason:
                ended.append(key)
            elif live.constraint:
                held[key] = live.constraint
        if held:
            assert self._constraints
            goes_on = self._constraints.advance(list(held.values()), [written[key] for key in held])
            ended += [key for key, may in zip(held, goes_on, strict=True) if not may]
        return ended

    def _count(self, plan: Plan, written: int) -> None:
        decoded = sum(segment.is_decode for segment in plan.segments)
        self._statistics = replace(
            self._statistics,
            microbatches=self._statistics.microbatches + 1,
            prompt_tokens=self._statistics.prompt_tokens + plan.tokens - decoded,
            output_tokens=self._statistics.output_tokens + written,
        )
