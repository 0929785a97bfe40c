"""The scheduler, on simulated ranks that remember whose tokens lie in which slot and block."""

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.memory import Capacity, Memory
from model.engine.plan import Plan, Segment
from model.engine.scheduler import Scheduler
from model.engine.sequence import blocks_for
from model.layers.ragged import BLOCK_TOKENS
from schemas.errors import Reason, RowError


@dataclass
class ShadowRank:
    """Executes plans on labels: slot -> (key, tokens), block -> (key, its index, tokens)."""

    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    blocks: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    saved: dict[int, tuple] = field(default_factory=dict)

    def run(self, plan: Plan) -> None:
        for swap in plan.saves:
            assert swap.sequence not in self.saved
            self.saved[swap.sequence] = (
                self.slots[swap.slot],
                [self.blocks[block] for block in swap.blocks],
            )
        for swap in plan.restores:
            self.slots[swap.slot], labels = self.saved.pop(swap.sequence)
            assert len(labels) == len(swap.blocks)
            self.blocks.update(zip(swap.blocks, labels, strict=True))
        for segment in plan.segments:
            self._compute(segment)

    def _compute(self, segment: Segment) -> None:
        key, end = segment.sequence, segment.context + segment.length
        assert len(segment.blocks) == blocks_for(end)
        if segment.context:
            assert self.slots[segment.slot] == (key, segment.context)
        for index, block in enumerate(segment.blocks[: blocks_for(segment.context)]):
            tokens = min(BLOCK_TOKENS, segment.context - index * BLOCK_TOKENS)
            assert self.blocks[block] == (key, index, tokens)
        self.slots[segment.slot] = (key, end)
        for index, block in enumerate(segment.blocks):
            self.blocks[block] = (key, index, min(BLOCK_TOKENS, end - index * BLOCK_TOKENS))


@dataclass
class Simulation:
    """A scheduler, its memory and a shadow rank; checks every promise at every step."""

    capacity: Capacity
    chunk_tokens: int = 128
    microbatches: int = 1
    ahead: bool = False
    plans: list[Plan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = Memory(self.capacity)
        self.scheduler = Scheduler(
            self.memory,
            chunk_tokens=self.chunk_tokens,
            microbatches=self.microbatches,
            ahead=self.ahead,
        )
        self.rank = ShadowRank()
        self.in_flight: deque[Plan] = deque()
        self.prompts: dict[int, int] = {}
        self.answers_left: dict[int, int] = {}
        self.scheduled: dict[int, int] = {}

    def add(self, prompt: int, answer: int, max_new_tokens: int | None = None) -> int:
        key = self.scheduler.add(prompt, max_new_tokens or answer)
        self.prompts[key], self.answers_left[key], self.scheduled[key] = prompt, answer, 0
        return key

    def step(self) -> None:
        while plan := self.scheduler.schedule():
            self._check(plan)
            self.plans.append(plan)
            self.in_flight.append(plan)
        assert self.in_flight or not self.scheduler.unfinished, "stuck"
        if self.in_flight:
            self._record(self.in_flight.popleft())

    def run(self) -> None:
        while self.scheduler.unfinished or self.in_flight:
            self.step()
        assert not self.rank.saved
        assert not any(self.answers_left.values())
        assert sorted(self.memory._slots) == list(range(self.capacity.slots))
        assert sorted(self.memory._blocks) == list(range(self.capacity.blocks))

    def _record(self, plan: Plan) -> None:
        self.rank.run(plan)
        self.scheduler.record(plan)
        for segment in plan.sampling_segments:
            if not self.answers_left[segment.sequence]:
                assert self.ahead, "computed after it ended"
                continue
            self.answers_left[segment.sequence] -= 1
            if not self.answers_left[segment.sequence]:
                self.scheduler.finish(segment.sequence)

    def _check(self, plan: Plan) -> None:
        assert plan.number == len(self.plans)
        assert plan.segments
        assert plan.tokens <= self.chunk_tokens
        assert not (plan.saves and plan.restores)
        keys = [segment.sequence for segment in plan.segments]
        assert len(set(keys)) == len(keys)
        for segment in plan.segments:
            self._check_segment(segment)
        decode = [segment.is_decode for segment in plan.segments]
        assert decode == sorted(decode, reverse=True), "decode goes first"
        self._check_in_flight(plan)
        self._check_ownership()

    def _check_segment(self, segment: Segment) -> None:
        prompt, end = self.prompts[segment.sequence], segment.context + segment.length
        assert segment.context == self.scheduled[segment.sequence], (
            "no token is skipped or repeated"
        )
        self.scheduled[segment.sequence] = end
        assert segment.samples == (end >= prompt)
        assert segment.is_decode == (segment.context >= prompt)
        if segment.context >= prompt:
            assert segment.length == 1
        else:
            assert segment.length >= 1
            assert end == prompt or end % BLOCK_TOKENS == 0

    def _check_in_flight(self, plan: Plan) -> None:
        assert len(self.in_flight) < self.microbatches + self.ahead
        busy = {segment.sequence for flying in self.in_flight for segment in flying.segments}
        awaited = {
            segment.sequence for flying in self.in_flight for segment in flying.sampling_segments
        }
        if not self.ahead:
            assert not awaited & {segment.sequence for segment in plan.segments}
        assert not busy & {swap.sequence for swap in plan.saves}

    def _check_ownership(self) -> None:
        running = self.scheduler._running.values()
        assert all(sequence.slot is not None for sequence in running)
        slots = [*(sequence.slot for sequence in running), *self.memory._slots]
        blocks = [block for sequence in running for block in sequence.blocks]
        blocks += self.memory._blocks
        assert sorted(slots) == list(range(self.capacity.slots))
        assert sorted(blocks) == list(range(self.capacity.blocks))


BLOCK = BLOCK_TOKENS
EDGES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 127, 128, 129, 191, 192, 193, 256, 257, 320]


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.one_of(st.sampled_from(EDGES), st.integers(1, 400)),
            st.integers(1, 150),
            st.integers(0, 100),
            st.integers(0, 30),
        ),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 6),
    blocks=st.integers(1, 24),
    chunk_tokens=st.integers(128, 512),
    microbatches=st.integers(1, 4),
    ahead=st.booleans(),
)
def test_everything_finishes_and_no_memory_is_leaked_or_shared(
    requests, slots, blocks, chunk_tokens, microbatches, ahead
):
    ahead = ahead and microbatches == 1
    simulation = Simulation(Capacity(slots, blocks), chunk_tokens, microbatches, ahead)
    for prompt, answer, unwritten, wait in requests:
        if blocks_for(prompt + answer + unwritten - 1) > blocks:
            with pytest.raises(RowError):
                simulation.add(prompt, answer, answer + unwritten)
        else:
            simulation.add(prompt, answer, answer + unwritten)
        for _ in range(wait):
            simulation.step()
    simulation.run()


@pytest.mark.parametrize("prompt", EDGES)
@pytest.mark.parametrize("chunk_tokens", [128, 192, 256])
def test_prompts_of_one_block_or_one_chunk_and_one_more_or_less_are_cut_at_blocks(
    prompt, chunk_tokens
):
    simulation = Simulation(Capacity(1, 8), chunk_tokens)
    simulation.add(prompt, 2)
    simulation.run()
    expected = [min(chunk_tokens, prompt - start) for start in range(0, prompt, chunk_tokens)]
    lengths = [plan.segments[0].length for plan in simulation.plans]
    assert lengths == [*expected, 1]


def test_a_row_that_can_never_fit_is_refused_with_numbers_instead_of_waiting_forever():
    simulation = Simulation(Capacity(4, 3))
    simulation.add(3 * BLOCK, 1)
    with pytest.raises(RowError, match=r"192 prompt tokens and up to 2 .* holds 192") as refused:
        simulation.add(3 * BLOCK, 2)
    assert refused.value.reason == Reason.PROMPT_TOO_LONG
    simulation.run()


def test_a_long_prompt_does_not_stall_the_decode_of_short_ones():
    simulation = Simulation(Capacity(4, 100), chunk_tokens=256)
    short = [simulation.add(10, 40) for _ in range(3)]
    simulation.step()
    long = simulation.add(64 * 60, 5)
    while simulation.scheduler.unfinished > 1:
        simulation.step()
    for plan in simulation.plans[1:40]:
        keys = [segment.sequence for segment in plan.segments]
        assert keys[:3] == short
    assert sum(long in [p.sequence for p in plan.segments] for plan in simulation.plans[1:21]) == 20


@pytest.mark.parametrize("unwritten", [0, 50])
def test_the_next_decode_is_planned_before_the_last_is_back(unwritten):
    simulation = Simulation(Capacity(8, 100), chunk_tokens=256, ahead=True)
    for _ in range(3):
        simulation.add(10, 20, 20 + unwritten)
    simulation.run()
    # 20 of each are sampled, and one more where only its text says that it ended.
    assert len(simulation.plans) == 20 + bool(unwritten)
    assert all(len(plan.segments) == 3 for plan in simulation.plans)


def test_decode_does_not_starve_prompts_when_there_are_more_sequences_than_budget():
    simulation = Simulation(Capacity(200, 1000), chunk_tokens=128)
    for _ in range(150):
        simulation.add(2, 100)
    for _ in range(6):
        simulation.step()
    key = simulation.add(BLOCK * 3, 1)
    for _ in range(4):
        simulation.step()
    assert simulation.scheduled[key] == BLOCK * 3


@pytest.mark.parametrize(("sequences", "ranks"), [(8, 4), (5, 4), (3, 2), (7, 3), (2, 4)])
def test_decode_is_shared_evenly_so_that_no_rank_waits(sequences, ranks):
    simulation = Simulation(Capacity(16, 100), chunk_tokens=1024, microbatches=ranks)
    for _ in range(sequences):
        simulation.add(10, 60)
    for _ in range(40):
        simulation.step()
    sizes = [len(plan.segments) for plan in simulation.plans[-8 * ranks : -ranks]]
    assert max(sizes) <= -(-sequences // ranks)
    flying = [len(plan.segments) for plan in simulation.in_flight]
    assert len(flying) >= min(sequences, ranks) - 1


def test_chunks_of_one_prompt_fill_all_microbatches_in_flight():
    simulation = Simulation(Capacity(2, 100), chunk_tokens=128, microbatches=4)
    key = simulation.add(64 * 20, 3)
    while simulation.scheduler.schedule():
        pass
    assert simulation.scheduler._running[key].in_flight == 4


def test_prompts_that_begin_together_are_spread_over_the_next_rounds():
    simulation = Simulation(Capacity(8, 400), chunk_tokens=4096, microbatches=4)
    for _ in range(8):
        simulation.add(2400, 2)
    simulation.run()
    chunks = [plan.tokens for plan in simulation.plans if not plan.segments[0].is_decode]
    # An even share of 19,200 tokens for 8 rounds of 4, up to a block; then less, as less is left.
    assert 600 - BLOCK <= chunks[0] <= 600
    assert max(chunks) <= 600
    assert min(chunks[:20]) >= 256


def test_prompts_that_memory_has_no_room_for_yet_make_no_share_larger():
    simulation = Simulation(Capacity(40, 100), chunk_tokens=16384, microbatches=4)
    for _ in range(40):
        simulation.add(40 * BLOCK, 2)  # two fit at once
    simulation.step()
    assert max(plan.tokens for plan in simulation.plans) <= 256


@pytest.mark.parametrize("ahead", [False, True])
def test_one_rank_takes_all_prompts_it_can_at_once(ahead):
    simulation = Simulation(Capacity(8, 400), chunk_tokens=4096, ahead=ahead)
    for _ in range(8):
        simulation.add(2400, 2)
    simulation.step()
    assert simulation.plans[0].tokens > 4096 - BLOCK


def test_the_youngest_is_preempted_and_resumed_before_a_new_one_is_admitted():
    simulation = Simulation(Capacity(8, 6))
    old, young = simulation.add(2 * BLOCK, 130), simulation.add(2 * BLOCK, 130)
    new = simulation.add(BLOCK, 1)
    simulation.run()
    saved = [swap.sequence for plan in simulation.plans for swap in plan.saves]
    assert saved == [young]
    assert simulation.scheduler.preemptions == 1
    resumed = _first(simulation.plans, lambda plan: any(plan.restores))
    admitted = _first(simulation.plans, lambda plan: any(p.sequence == new for p in plan.segments))
    last_of_old = max(n for n, plan in enumerate(simulation.plans) if _has(plan, old))
    assert last_of_old < resumed <= admitted


def test_a_preempted_sequence_does_not_swap_in_and_out_at_every_block():
    rng = random.Random(0)
    simulation = Simulation(Capacity(16, 40), chunk_tokens=256)
    for _ in range(16):
        simulation.add(rng.randint(1, 200), 200)
    simulation.run()
    assert 0 < simulation.scheduler.preemptions <= 32


def _has(plan: Plan, key: int) -> bool:
    return any(segment.sequence == key for segment in plan.segments)


def _first(plans: Iterable[Plan], wanted) -> int:
    return next(number for number, plan in enumerate(plans) if wanted(plan))
