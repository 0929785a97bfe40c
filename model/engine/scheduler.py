"""Decides what each microbatch computes and where in memory. Ints in, a plan out; no torch.

The rules it keeps:
- Decode goes first, then the chunks of prompts in order of arrival, within `chunk_tokens`.
- The ranks execute microbatches strictly in order, so a prompt may have chunks in several that
  are in flight, and memory may be given to another while its last user is in flight.
- A decoding sequence is in one microbatch in flight at most, for it needs its sampled token;
  with `ahead` in two, for the device has that token. Should it turn out to be the last of its
  text, the other microbatch has computed one in vain.
- Decode is split evenly over the microbatches, so that no rank waits for a large one. With several
  ranks prompts are spread too: over the next rounds instead of into the one at hand.
- When a decode token finds no free block, the youngest sequence that is not in flight goes to
  the host, and comes back, oldest first, before any new one is admitted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from model.engine.memory import Memory
from model.engine.plan import Plan, Segment, Swap
from model.engine.sequence import Sequence, blocks_for
from model.layers.ragged import BLOCK_TOKENS
from schemas.errors import Reason, RowError

# With several ranks the prompts that could begin now are spread over so many microbatches each, in
# shares of so many tokens at least. Sequences end in bunches, and a rank that computes the prompts
# of a bunch at once is waited for by all others: simulated (`vl01 bench ranks`), with answers of
# many lengths, four ranks were busy 59 to 72% of the time and are 95 to 99% with these. Twice the
# rounds are no faster, half of them up to 5% slower. So few tokens cost nothing: decode reads the
# weights anyway.
_ROUNDS = 8
_LEAST_SHARE = 256


@dataclass
class _Draft:
    """A plan in the making; `budget` is how many tokens still fit in."""

    budget: int
    saves: list[Swap] = field(default_factory=list)
    restores: list[Swap] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)


class Scheduler:
    """Owns every unfinished sequence: waiting, running (with memory) or preempted (on the host).

    memory: the slots and blocks to give out. chunk_tokens: most tokens of a microbatch, at least
    two blocks. microbatches: how many the ranks work on at once. ahead: plan one more than that.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        chunk_tokens: int,
        microbatches: int,
        ahead: bool = False,
    ) -> None:
        self._memory = memory
        self._chunk_tokens = chunk_tokens
        self._microbatches = microbatches
        self._ahead = ahead
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._preempted: dict[int, Sequence] = {}
        self._in_flight = 0
        self._number = 0
        self._next_key = 0
        self.preemptions = 0

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._preempted)

    @property
    def running(self) -> int:
        """Sequences that are in memory."""
        return len(self._running)

    def add(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """Queue a sequence and return its key; keys grow in order of arrival.

        Raises RowError (PROMPT_TOO_LONG) when it could not be finished even alone.
        """
        total = prompt_tokens + max_new_tokens
        sizes = f"{prompt_tokens} prompt tokens and up to {max_new_tokens} new ones"
        # The last token that is sampled is never computed.
        if blocks_for(total - 1) > self._memory.capacity.blocks:
            fits = self._memory.capacity.blocks * BLOCK_TOKENS
            raise RowError(Reason.PROMPT_TOO_LONG, f"{sizes}; the engine's memory holds {fits}")
        key = self._next_key
        self._next_key += 1
        self._waiting[key] = Sequence(key, prompt_tokens, total, prompt_tokens)
        return key

    def schedule(self) -> Plan | None:
        """The next microbatch, or None when nothing can be done before one in flight is back."""
        if self._in_flight == self._microbatches + self._ahead:
            return None
        draft = _Draft(self._chunk_tokens)
        self._resume(draft)
        self._decode(draft)
        draft.budget = min(draft.budget, self._prompt_share())
        self._continue_prompts(draft)
        self._admit(draft)
        if not draft.segments:
            return None
        self._in_flight += 1
        self._number += 1
        return Plan(
            self._number - 1, tuple(draft.saves), tuple(draft.restores), tuple(draft.segments)
        )

    def record(self, plan: Plan) -> None:
        """The microbatch is back. Sequences that finished while it was in flight are gone."""
        self._in_flight -= 1
        for segment in plan.segments:
            if sequence := self._running.get(segment.sequence):
                sequence.in_flight -= 1

    def finish(self, key: int) -> None:
        """Forget a sequence, whose last token is recorded, and free its memory."""
        self._release(self._running.pop(key))

    # -- the steps of `schedule`

    def _resume(self, draft: _Draft) -> None:
        for key in sorted(self._preempted):
            sequence = self._preempted[key]
            if not self._fits(sequence):
                return
            del self._preempted[key]
            self._start(sequence)
            draft.restores.append(_swap(sequence))

    def _decode(self, draft: _Draft) -> None:
        ready = [
            sequence
            for sequence in self._running.values()
            if sequence.may_decode and (self._ahead or not sequence.in_flight)
        ]
        ready.sort(key=lambda sequence: (sequence.last_microbatch, sequence.key))
        share = self._decode_share(len(ready))
        for sequence in ready:
            if len(draft.segments) == share:
                return
            # A victim of this very loop is no longer running.
            if sequence.slot is not None and self._grow(sequence, draft):
                self._put(sequence, sequence.tokens, draft)

    def _continue_prompts(self, draft: _Draft) -> None:
        for key in sorted(self._running):
            self._put_chunk(self._running[key], draft)

    def _admit(self, draft: _Draft) -> None:
        while self._waiting and not self._preempted:
            sequence = next(iter(self._waiting.values()))
            if not _chunk_end(sequence, draft.budget):
                return
            if not self._fits(sequence):
                return
            del self._waiting[sequence.key]
            self._start(sequence)
            self._put_chunk(sequence, draft)

    # -- their parts

    def _decode_share(self, ready: int) -> int:
        """How many decode tokens this microbatch takes."""
        openings = max(1, self._microbatches - self._in_flight)
        decoding = sum(sequence.prompt_left == 0 for sequence in self._running.values())
        return min(
            -(-ready // openings),
            -(-decoding // self._microbatches),
            self._chunk_tokens - BLOCK_TOKENS,  # room for one block of a prompt
        )

    def _prompt_share(self) -> int:
        """How many prompt tokens this microbatch takes."""
        if self._microbatches == 1:
            return self._chunk_tokens
        left = sum(sequence.prompt_left for sequence in self._running.values())
        left += sum(sequence.prompt_tokens for sequence in self._next_ones())
        return max(_LEAST_SHARE, -(-left // (_ROUNDS * self._microbatches)))

    def _next_ones(self) -> Iterator[Sequence]:
        """Those waiting that the free memory has room for."""
        blocks = self._memory.free_blocks - len(self._running)
        for sequence in islice(self._waiting.values(), self._memory.free_slots):
            needed = blocks_for(sequence.tokens)
            if needed > blocks:
                return
            blocks -= needed + 1  # and a spare one, as `_fits` wants
            yield sequence

    def _put_chunk(self, sequence: Sequence, draft: _Draft) -> None:
        if sequence.prompt_left:
            end = _chunk_end(sequence, draft.budget)
            if end > sequence.computed:
                self._put(sequence, end, draft)

    def _put(self, sequence: Sequence, end: int, draft: _Draft) -> None:
        """Add the sequence's tokens up to `end` to the microbatch."""
        assert sequence.slot is not None
        length = end - sequence.computed
        samples = end >= sequence.prompt_tokens
        draft.segments.append(
            Segment(
                sequence=sequence.key,
                slot=sequence.slot,
                blocks=tuple(sequence.blocks[: blocks_for(end)]),
                context=sequence.computed,
                length=length,
                is_decode=sequence.prompt_left == 0,
                samples=samples,
            )
        )
        draft.budget -= length
        sequence.computed = end
        sequence.tokens += samples
        sequence.in_flight += 1
        sequence.last_microbatch = self._number

    def _fits(self, sequence: Sequence) -> bool:
        """Is there a slot, and its blocks besides one spare block for every running sequence?

        The spare blocks let all of them decode 64 more tokens before one has to be preempted.
        """
        blocks = blocks_for(sequence.tokens) + len(self._running)
        return self._memory.free_slots > 0 and self._memory.free_blocks >= blocks

    def _start(self, sequence: Sequence) -> None:
        """Give a sequence the memory for all tokens known of it."""
        sequence.slot = self._memory.take_slot()
        sequence.blocks = self._memory.take_blocks(blocks_for(sequence.tokens))
        self._running[sequence.key] = sequence

    def _grow(self, sequence: Sequence, draft: _Draft) -> bool:
        """Have a block for the next token; False when it must wait for one in flight."""
        if blocks_for(sequence.tokens) <= len(sequence.blocks):
            return True
        if not self._memory.free_blocks and not self._preempt_younger(sequence, draft):
            return False
        sequence.blocks += self._memory.take_blocks(1)
        return True

    def _preempt_younger(self, sequence: Sequence, draft: _Draft) -> bool:
        """Save the youngest sequence not in flight, if it is younger than this one.

        Never itself: with nothing in flight the oldest always finds one, or is alone and fits.
        """
        idle = [key for key, other in self._running.items() if not other.in_flight]
        if not idle or max(idle) <= sequence.key:
            return False
        victim = self._running[max(idle)]
        draft.saves.append(_swap(victim))
        self._preempted[victim.key] = self._running.pop(victim.key)
        self._release(victim)
        self.preemptions += 1
        return True

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._memory.give_back(sequence.slot, sequence.blocks)
        sequence.slot, sequence.blocks = None, []


def _swap(sequence: Sequence) -> Swap:
    assert sequence.slot is not None
    used = blocks_for(sequence.computed)
    return Swap(sequence.key, sequence.slot, tuple(sequence.blocks[:used]))


def _chunk_end(sequence: Sequence, budget: int) -> int:
    """Where the next chunk of a prompt ends when it may have `budget` tokens.

    At the prompt's end or a multiple of BLOCK_TOKENS from its start, so that attention works in
    the same blocks however the prompt is cut.
    """
    if sequence.prompt_left <= budget:
        return sequence.prompt_tokens
    return (sequence.computed + budget) // BLOCK_TOKENS * BLOCK_TOKENS
