"""What has been written for one request: its tokens, when they end, and the text they make."""

from collections.abc import Callable, Sequence

from schemas.requests import FinishReason, Sampling

# A stop string of B bytes lies within the last B tokens, for each makes at least one byte, except
# special tokens, which make none: allow for a few of them.
_SPECIAL_TOKENS_WITHIN = 8

_CUT_SHORT = "\ufffd"  # how a character shows of which bytes are missing


class Answer:
    """Grows by a token at a time until the end-of-text token, a stop string or max_new_tokens.

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

    def append(self, token: int, logprob: float) -> FinishReason | None:
        """Add a token; the reason why it was the last one, or None."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in self._eos_token_ids or self._stop_string_ends_here():
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) == self._sampling.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        return self.finish_reason

    @property
    def text(self) -> str:
        """The text without end-of-text tokens, cut before the stop string that ended it."""
        text = self._decode([id for id in self.token_ids if id not in self._eos_token_ids])
        cut = self._cut(text)
        return text if cut is None else text[:cut]

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)

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
