"""Tells when an answer goes round in circles. Knows tokens and their text, not the model.

Two signs, looked for once in STRIDE tokens: the last tokens are one span over and over, or the last
lines are a handful of lines over and over. Both thresholds lie beyond what a printed page holds:
about sixty rows of an empty table or of zeros, a dotted line across the page, a sheet of labels.
"""

from collections import deque
from collections.abc import Callable, Sequence

STRIDE = 32  # tokens between two looks: a look takes some 40 us, little more than 1 us a token
MOST_PERIOD = 512  # tokens of the longest span that is looked for

LINES = 128  # that hold no more than FEW different ones; the rows of a page are half as many
FEW = 4

_CUT_SHORT = "\ufffd"  # how a character shows of which bytes are missing


def tokens_that_repeat(period: int) -> int:
    """How many tokens in a row must equal those `period` before them to be a loop.

    A dotted line is up to 150 tokens of one dot; a ruled page has at most some sixty equal rows of
    up to twelve tokens (or a few longer ones: thirty labels of 25 tokens, four receipts of 200).
    A longer span has to be there four times.
    """
    return max(192, min(64 * period, 768), 3 * period)


_LENGTHS = tuple((period, tokens_that_repeat(period)) for period in range(1, MOST_PERIOD + 1))


class Repetition:
    """Watches one answer. The verdict depends on its tokens alone."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._decoded = 0  # tokens whose text is in `_lines` and `_line`
        self._line = ""  # begun, not ended
        self._lines: deque[tuple[str, int]] = deque(maxlen=LINES)  # and the tokens up to its end

    def tokens_worth_keeping(self, token_ids: list[int]) -> int | None:
        """None while the answer does not repeat itself; else the length of what stands before the
        loop and its first round. To be asked after every token."""
        if len(token_ids) % STRIDE:
            return None
        self._read_lines(token_ids)
        period = _period(token_ids)
        if period is not None:
            return _end_of_first_round(token_ids, period)
        return self._end_of_few_lines()

    def _read_lines(self, token_ids: list[int]) -> None:
        text = self._decode(token_ids[self._decoded :])
        if text.endswith(_CUT_SHORT):  # the rest of this character is still to come
            return
        self._decoded = len(token_ids)
        *ended, self._line = (self._line + text).split("\n")
        self._lines.extend((line.strip(), self._decoded) for line in ended if line.strip())

    def _end_of_few_lines(self) -> int | None:
        """Tokens up to where each of the few lines has been seen (up to STRIDE more)."""
        if len(self._lines) < LINES:
            return None
        first = {line: end for line, end in reversed(self._lines)}
        return max(first.values()) if len(first) <= FEW else None


def _period(token_ids: list[int]) -> int | None:
    """The shortest span that the tail repeats long enough to be a loop."""
    last = token_ids[-1]
    for period, length in _LENGTHS:
        if length + period > len(token_ids):
            return None
        # Single tokens first: they rule nearly all periods out for a tenth of the price.
        if (
            token_ids[-1 - period] == last
            and token_ids[-length] == token_ids[-length - period]
            and token_ids[-length // 2] == token_ids[-length // 2 - period]
            and token_ids[-length:] == token_ids[-length - period : -period]
        ):
            return period
    return None


def _end_of_first_round(token_ids: list[int], period: int) -> int:
    at = len(token_ids)
    while at > period and token_ids[at - 1] == token_ids[at - 1 - period]:
        at -= 1
    return at
