"""What the scheduler asks of every rank for one microbatch: ints only, no torch, no text."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Segment:
    """The tokens of one sequence in one microbatch: a chunk of its prompt, or one decode token.

    context: tokens of it that are in memory before; length: new tokens.
    blocks: its K/V blocks in order, as many as hold context + length tokens.
    is_decode: the one token is of the answer, not of the prompt.
    samples: the last token's logits give the sequence's next token.
    """

    sequence: int
    slot: int
    blocks: tuple[int, ...]
    context: int
    length: int
    is_decode: bool
    samples: bool


@dataclass(frozen=True)
class Swap:
    """A sequence's memory on its way to the host or back: its slot and the blocks in use."""

    sequence: int
    slot: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """One microbatch. Every rank first saves, then restores, then computes the segments.

    segments: the decode tokens, then the prompt chunks; never empty, a sequence at most once.
    """

    number: int
    saves: tuple[Swap, ...]
    restores: tuple[Swap, ...]
    segments: tuple[Segment, ...]

    @cached_property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @cached_property
    def sampling_segments(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.samples)
