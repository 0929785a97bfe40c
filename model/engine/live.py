"""One unfinished request as the engine sees it: what was asked, what is written, what may come."""

from dataclasses import dataclass, field

import numpy as np

from model.engine.answer import Answer
from model.engine.constraint import Constraint
from model.engine.microbatch import ON_DEVICE
from model.engine.plan import Segment
from model.engine.sampling import Draw, uniform
from schemas.requests import FinishReason, Request, Result


@dataclass
class Live:
    """tiles_to_send: of the request's image, None without one and once the first rank has them.
    The request keeps them, for an engine that starts over."""

    request: Request
    answer: Answer
    constraint: Constraint | None
    tiles_to_send: np.ndarray | None = field(init=False)

    def __post_init__(self) -> None:
        self.tiles_to_send = self.request.tiles

    def token(self, segment: Segment) -> int:
        """Of the answer, which the segment decodes."""
        answered, known = segment.context - len(self.request.token_ids), self.answer.token_ids
        return known[answered] if answered < len(known) else ON_DEVICE

    def chunk(self, segment: Segment) -> np.ndarray:
        """int32 [length], of the prompt."""
        return self.request.token_ids[segment.context : segment.context + segment.length]

    def draw(self, segment: Segment) -> Draw:
        sampling = self.request.sampling
        position = segment.context + segment.length
        number = uniform(sampling.seed, position) if sampling.temperature else 0.0
        return Draw(sampling.temperature, sampling.top_p, number)

    def knows_all_before(self, segment: Segment) -> bool:
        """Are all tokens before the one that this segment gives known to the host?"""
        known = len(self.request.token_ids) + len(self.answer.token_ids)
        return known == segment.context + segment.length

    def result(self) -> Result:
        """Of an answer that has come to its end, or whose grammar cannot be followed further."""
        answer = self.answer
        broken = self.constraint is not None and self.constraint.error is not None
        finish_reason = FinishReason.CONSTRAINT if broken else answer.finish_reason
        assert finish_reason is not None
        return Result(
            id=self.request.id,
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            finish_reason=finish_reason,
            prompt_tokens=len(self.request.token_ids),
            mean_logprob=answer.mean_logprob,
            token_logprobs=tuple(answer.logprobs),
            token_ends=tuple(answer.token_ends),
        )
