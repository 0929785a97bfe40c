"""How busy ranks would be: the real scheduler, on ranks that take the time the cost model says.

Nothing is computed. What comes out is simulated and never to be called measured.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from model.config import VL01Config
from model.engine.cost import Cost, Work
from model.engine.memory import Capacity, Memory
from model.engine.plan import Plan
from model.engine.ranks import layer_spans
from model.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Asked:
    """One request: tokens of its prompt and of its answer, tiles of its image."""

    prompt: int
    new: int
    tiles: int


@dataclass(frozen=True)
class Delays:
    """Seconds besides computing. host: to plan a microbatch and hand it to the first rank. hop,
    hop_token: for hidden states to the next rank, and for each token of them (measured between two
    H200: 40 us at 128 tokens, 300 at 8,192). back: for the chosen tokens to the host."""

    host: float = 2e-3
    hop: float = 4e-5
    hop_token: float = 3.2e-8
    back: float = 5e-4


@dataclass(frozen=True)
class Simulated:
    """seconds: from the first request in to the last answer out. busy: the share of them in which
    each rank computes. steady: the same from when all ranks have work until no request waits.
    rate: answers a second, of the middle third of them: what a long run makes."""

    requests: int
    seconds: float
    microbatches: int
    busy: tuple[float, ...]
    steady: tuple[float, ...]
    rate: float


# How many requests, all together more than fit in memory, and of which kinds in turn.
STREAMS = {
    "coco640x480": (400, (Asked(2400, 128, 5),)),
    "page-a4": (240, (Asked(8080, 256, 19),)),
    "mixed": (800, (Asked(8080, 256, 19), *[Asked(600, 100, 2)] * 19)),
}


def mean_tokens(name: str) -> int:
    """Of a request of the stream, answer included."""
    _, kinds = STREAMS[name]
    return round(mean(one.prompt + one.new for one in kinds))


def stream(name: str, *, vary: float = 0.7, seed: int = 0, at_least: int = 0) -> list[Asked]:
    """vary: how much longer or shorter than said an answer may be, as a share of it. at_least:
    requests."""
    rng, (requests, kinds) = random.Random(seed), STREAMS[name]
    asked = [kinds[i % len(kinds)] for i in range(max(requests, at_least))]
    return [
        Asked(one.prompt, max(1, round(one.new * rng.uniform(1 - vary, 1 + vary))), one.tiles)
        for one in asked
    ]


def simulate(
    model: VL01Config,
    ranks: int,
    capacity: Capacity,
    requests: Sequence[Asked],
    *,
    chunk_tokens: int = 16384,
    delays: Delays = Delays(),
) -> Simulated:
    """All requests through one replica, which is handed more than it has room for, as in a run."""
    scheduler = Scheduler(
        Memory(capacity), chunk_tokens=chunk_tokens, microbatches=ranks, ahead=ranks == 1
    )
    line = _Ranks(Cost(model), layer_spans(model, ranks), delays)
    waiting, left, tiles = deque(requests), {}, {}
    in_flight: deque[tuple[Plan, float]] = deque()  # with the time when its tokens are back
    answered: list[float] = []  # when
    now, no_more_wait = 0.0, None
    while waiting or scheduler.unfinished:
        while waiting and scheduler.unfinished < 2 * capacity.slots:
            asked = waiting.popleft()
            key = scheduler.add(asked.prompt, asked.new)
            left[key], tiles[key] = asked.new, asked.tiles
        while plan := scheduler.schedule():
            now += delays.host
            seen = sum(tiles.pop(segment.sequence, 0) for segment in plan.segments)
            in_flight.append((plan, line.submit(now, Work.of(plan.segments, seen))))
        if no_more_wait is None and not waiting and scheduler.running == scheduler.unfinished:
            no_more_wait = now
        plan, back = in_flight.popleft()
        now = max(now, back)
        scheduler.record(plan)
        for key in [segment.sequence for segment in plan.sampling_segments]:
            if key in left:  # else it ended while this microbatch was in flight
                left[key] -= 1
                if not left[key]:
                    del left[key]
                    scheduler.finish(key)
                    answered.append(now)
    return line.told(answered, no_more_wait or now)


class _Ranks:
    """They compute microbatches strictly in order, each as soon as the one before has."""

    def __init__(self, cost: Cost, spans: tuple[range, ...], delays: Delays) -> None:
        self._cost, self._spans, self._delays = cost, spans, delays
        self._computed: list[list[tuple[float, float]]] = [[] for _ in spans]  # from when to when

    def submit(self, now: float, work: Work) -> float:
        """When the host has the tokens."""
        delays = self._delays
        for span, computed in zip(self._spans, self._computed, strict=True):
            started = max(now, computed[-1][1] if computed else 0.0)
            ended = started + self._cost.seconds(span, work)
            computed.append((started, ended))
            now = ended + delays.hop + delays.hop_token * work.tokens
        return ended + delays.back

    def told(self, answered: list[float], no_more_wait: float) -> Simulated:
        (all_have_work, _), seconds = self._computed[-1][0], answered[-1]
        return Simulated(
            len(answered),
            seconds,
            len(self._computed[0]),
            tuple(_share(computed, 0.0, seconds) for computed in self._computed),
            tuple(_share(computed, all_have_work, no_more_wait) for computed in self._computed),
            _middle_rate(answered),
        )


def _middle_rate(answered: list[float]) -> float:
    first, last = len(answered) // 3, len(answered) * 2 // 3
    return (last - first) / max(1e-9, answered[last] - answered[first])


def _share(computed: list[tuple[float, float]], start: float, end: float) -> float:
    inside = (min(until, end) - max(since, start) for since, until in computed)
    return sum(max(0.0, seconds) for seconds in inside) / max(1e-9, end - start)
