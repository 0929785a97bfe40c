"""What the coordinator and a rank process say to each other.

Besides these: Image, Microbatch, Masks and Sampled.
A rank first gets a Start and answers with its Room; it then gets the Capacity and answers Ready.
Busy comes now and then, between all others.
"""

from dataclasses import dataclass

from model.engine.config import EngineConfig
from model.engine.transport import MeetingPoint


@dataclass(frozen=True)
class Start:
    """What a rank needs to know of itself.

    gpu: the index of its own among those that its process sees. log_level: of the coordinator's
    logging module.
    """

    config: EngineConfig
    rank: int
    gpu: int
    meeting_point: MeetingPoint
    log_level: int


@dataclass(frozen=True)
class Ready:
    """The rank has loaded its layers and allocated its memory."""


@dataclass(frozen=True)
class Busy:
    """How long the rank has computed since it was ready, in seconds."""

    seconds: float


@dataclass(frozen=True)
class Failed:
    """The rank raised an exception and ends."""

    traceback: str
