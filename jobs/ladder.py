"""What each task tries again when an answer is poor: change it here, or give a job its own ladder.

A rung is climbed only if the best answer so far has one of its causes; each is climbed once.
"""

from schemas.ladder import Cause, Step

# A page that lies on its head or its side makes the model unsure, or go in circles, or see
# nothing. On its head comes first: that is how pages are fed wrongly; the sides are next.
_IN_ALL_TURNS = tuple(
    Step(when=(Cause.UNSURE, Cause.REPETITION, Cause.EMPTY), turn=turn) for turn in (180, 90, 270)
)
_FURTHER = Step(when=(Cause.MAX_NEW_TOKENS,), more_tokens=2)  # last: with the page the right way up

PAGE = (Step(when=(Cause.REPETITION,), temperature=0.4), *_IN_ALL_TURNS, _FURTHER)
FIELDS = (Step(when=(Cause.REPETITION, Cause.INVALID), temperature=0.4), *_IN_ALL_TURNS, _FURTHER)
