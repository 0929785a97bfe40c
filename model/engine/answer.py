"""What has been written for one request: its tokens, when they end, and the text they make."""

from collections.abc import Callable, Sequence

from model.engine.repetition import Repetition
from schemas.requests import FinishReason, Sampling

# A stop string of B bytes lies within the last B tokens, for each makes at least one byte, except
# special tokens, which make none: allow for a few of them.
_SPECIAL_TOKENS_WITHIN = 8

_CUT_SHORT = "\ufffd"  # how a character shows of which bytes are missing


class Answer:
    """Grows by a token at a time until the end-of-text token, a stop string, max_new_tokens or,
    if asked for, a loop, of which the text keeps the first round.

    decode: token ids to text. Every written token counts, in `token_ids`, `logprobs` and
    `token_ends`: also the end-of-text token, which is not part of the text, and those of a stop
    string.
    """

    def __init__(
        self,
        sampling: Sampling,
        eos_token_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self._sampling = sampling
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decode = decode
        longest = max((len(stop.encode()) for stop in sampling.stop), default=0)
        self._window = longest + _SPECIAL_TOKENS_WITHIN
        self._repetition = Repetition(decode) if sampling.stop_repetition else None
        self._kept: int | None = None  # tokens before the second round of a loop; None: all

    def append(self, token: int, logprob: float) -> FinishReason | None:
        """Add a token; the reason why it was the last one, or None."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in self._eos_token_ids or self._stop_string_ends_here():
            self.finish_reason = FinishReason.STOP
        elif self._goes_in_circles():
            self.finish_reason = FinishReason.REPETITION
        elif len(self.token_ids) == self._sampling.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        return self.finish_reason

    @property
    def text(self) -> str:
        """The text without end-of-text tokens, cut before the stop string that ended it, or where
        it began to repeat itself."""
        kept = self.token_ids[: self._kept]
        text = self._decode([id for id in kept if id not in self._eos_token_ids])
        cut = self._cut(text)
        return text if cut is None else text[:cut]

    @property
    def mean_logprob(self) -> float:
        """Of all tokens but the rounds of a loop, each of which is surer than the one before."""
        kept = self.logprobs[: self._kept]
        return sum(kept) / len(kept)

    @property
    def token_ends(self) -> list[int]:
        """The length of the text, in characters, once each token was written."""
        ends, length, pending = [], 0, []
        longest = len(self.text)
        for id in self.token_ids:
            if id not in self._eos_token_ids:
                pending.append(id)
            piece = self._decode(pending)
            ends.append(min(length + len(piece), longest))
            if not piece.endswith(_CUT_SHORT):  # what is whole is decoded once
                length, pending = length + len(piece), []
        return ends

    def _goes_in_circles(self) -> bool:
        if self._repetition is not None:
            self._kept = self._repetition.tokens_worth_keeping(self.token_ids)
        return self._kept is not None

    def _stop_string_ends_here(self) -> bool:
        """Looks at the last tokens first: decoding everything at each token is quadratic."""
        if not self._sampling.stop:
            return False
        return (
            self._cut(self._decode(self.token_ids[-self._window :])) is not None
            and self._cut(self._decode(self.token_ids)) is not None
        )

    def _cut(self, text: str) -> int | None:
        """Where the stop string starts that is complete first; None without one."""
        found = [(text.find(stop), len(stop)) for stop in self._sampling.stop]
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None
