"""What the coordinator and a rank process say to each other.

Besides these: Image, Microbatch, Masks and Sampled.
A rank first gets a Start and answers with its Room; it then gets the Capacity and answers Ready.
A rank without memory says OutOfMemory; upon that all get a Forget and answer Forgotten. AreYouThere
is answered at any time, past all that the rank has still to do.
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
class AreYouThere:
    """Asked now and then of a rank that is waited for."""


@dataclass(frozen=True)
class Alive:
    """doing: in words. progress: changes as long as the rank comes on; None while that cannot be
    seen: it starts, loads its layers, or compiles a kernel. waits: for another rank, or for work.
    busy_seconds: how long it has computed since it was ready.
    """

    doing: str
    progress: int | None
    waits: bool
    busy_seconds: float


@dataclass(frozen=True)
class OutOfMemory:
    """The rank could not compute a microbatch, and computes none of those after it till Forget."""

    message: str


@dataclass(frozen=True)
class Forget:
    """All sequences. What was sent before is in flight; what follows is new."""


@dataclass(frozen=True)
class Forgotten:
    """The rank has passed on all that was in flight, computed or not, and forgotten all."""


@dataclass(frozen=True)
class Failed:
    """The rank raised an exception and ends."""

    traceback: str
