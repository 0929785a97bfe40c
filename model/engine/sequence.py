"""One request as the scheduler sees it: counts and memory ids, neither tokens nor text."""

from dataclasses import dataclass, field

from model.layers.ragged import BLOCK_TOKENS


def blocks_for(tokens: int) -> int:
    """K/V blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass
class Sequence:
    """key: order of arrival. prompt_tokens, tokens: without and with the answer as far as it is
    sampled or being sampled; most_tokens: with the longest answer asked for.
    computed: tokens handed to the ranks; in memory once the microbatches in flight are done.
    in_flight: microbatches on their way that carry it. last_microbatch: the newest of them ever.
    slot, blocks: what it holds in memory; None and empty while it waits or is preempted.
    """

    key: int
    prompt_tokens: int
    most_tokens: int
    tokens: int
    computed: int = 0
    in_flight: int = 0
    last_microbatch: int = -1
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)

    @property
    def prompt_left(self) -> int:
        return max(0, self.prompt_tokens - self.computed)

    @property
    def may_decode(self) -> bool:
        """Its prompt is computed, or in flight, and it wants another token."""
        return self.prompt_left == 0 and self.tokens < self.most_tokens
