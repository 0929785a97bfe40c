"""Which tokens may come next in an answer held to a JSON Schema, by llguidance. Knows no torch.

C constrained sequences, W = ceil(vocabulary / 32) words of 32 bits.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from schemas.errors import CheckpointError, ConfigError

# Tokens of plain text by length: where a string of limited length has room for a whole class, its
# tokens are allowed at once. With llguidance's own classes (10, 30) a mask of 200,064 tokens takes
# 0.27 ms on average over invoices, and 3.8 in the slowest hundredth; with these 0.20 and 2.7.
_PLAIN = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [*(f"{_PLAIN}{{1,{length}}}" for length in (*range(1, 17), 24, 32)), f"{_PLAIN}+"]

_MOST_THREADS = 16

# Its errors otherwise bring along the whole grammar.
_LIMITS = LLParserLimits(verbose_errors=False)


def check_schema(json_schema: str) -> None:
    """Raises ConfigError, with llguidance's reason, when answers cannot be held to this schema:
    it is no JSON object, has an unsupported keyword, or no answer could ever satisfy it."""
    _check(_grammar(json_schema), None)


class Constraint:
    """Where one answer stands in the grammar of its schema.

    matcher: still being made, by another thread.
    """

    def __init__(self, matcher: Future[LLMatcher]) -> None:
        self._matcher = matcher

    @cached_property
    def matcher(self) -> LLMatcher:
        return self._matcher.result()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further, if so: it grew past llguidance's limits.
        It stays so, and masks then allow the end-of-text token alone."""
        if not self.matcher.is_error():
            return None
        return self.matcher.get_error().replace("<non-verbose/>", "").strip()


class Constraints:
    """Makes the constraints of one engine and their masks.

    tokenizer: tokenizer.json as text. vocab_size: of the logits; ids that the tokenizer does not
    have are never allowed. Special tokens neither, but `eos_token_ids`, and these exactly where
    the answer is complete.
    threads: compute masks with so many at most; the caller's waits, without holding the GIL.

    Raises CheckpointError when llguidance cannot read the tokenizer.
    """

    def __init__(
        self, tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int], threads: int
    ) -> None:
        try:
            self._tokenizer = LLTokenizer(
                tokenizer,
                n_vocab=vocab_size,
                eos_token=list(eos_token_ids),
                slices=_SLICES,
            )
        except ValueError as error:
            raise CheckpointError(
                f"answers cannot be held to a JSON Schema by the checkpoint's tokenizer: {error}; "
                f"expected a byte-level BPE of at most {vocab_size} tokens with an end of text, "
                "as the released one's"
            ) from error
        self._vocab_size = vocab_size
        threads = min(threads, _MOST_THREADS)
        self._executor = LLExecutor(threads)
        self._makers = ThreadPoolExecutor(threads, thread_name_prefix="grammar")
        self._checked_grammar = lru_cache(maxsize=64)(self._check_grammar)

    def start(self, json_schema: str) -> Constraint:
        """A constraint for an answer of which nothing is written. Raises ConfigError as
        `check_schema` does."""
        grammar = self._checked_grammar(json_schema)
        return Constraint(self._makers.submit(self._make, grammar))

    def advance(self, constraints: Sequence[Constraint], tokens: Sequence[int]) -> list[bool]:
        """Each answer goes on with its token. Can its grammar be followed any further?"""
        matchers = [constraint.matcher for constraint in constraints]
        return self._executor.consume_token_par(list(zip(matchers, tokens, strict=True)))

    def masks(
        self,
        constraints: Sequence[Constraint],
        room: Callable[[int, int], np.ndarray] = lambda *shape: np.empty(shape, dtype=np.int32),
    ) -> np.ndarray:
        """int32 [C, W]: bit v % 32 of word v // 32 says whether token v may come next.

        room: gives the memory that they are written to, given C and W.
        """
        bits_CW = room(len(constraints), -(-self._vocab_size // 32))
        if constraints:
            rows = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
            fill_next_token_bitmask_par(self._executor, rows, bits_CW)
        return bits_CW

    def _make(self, grammar: str) -> LLMatcher:
        """Takes milliseconds, without holding the GIL, and fails in the matcher's own way.

        Not a deep copy of a matcher made before: copies share a lock, and their masks would be
        computed one after the other.
        """
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)

    def _check_grammar(self, json_schema: str) -> str:
        grammar = _grammar(json_schema)
        _check(grammar, self._tokenizer)
        return grammar


def _grammar(json_schema: str) -> str:
    try:
        schema = json.loads(json_schema)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the JSON Schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"the JSON Schema is {json_schema[:40]}; expected an object")
    return LLMatcher.grammar_from_json_schema(
        json_schema,
        # They win over "x-guidance", by which a schema may set options of its own.
        overrides={
            "whitespace_flexible": False,  # else a model can write spaces for ever
            "item_separator": ",",
            "key_separator": ":",
            "lenient": False,  # refuse a keyword that would be ignored
        },
    )


def _check(grammar: str, tokenizer: LLTokenizer | None) -> None:
    if error := LLMatcher.validate_grammar(grammar, tokenizer, limits=_LIMITS):
        raise ConfigError(
            f"answers cannot be held to this JSON Schema: {error}; leave out what is named there"
        )
