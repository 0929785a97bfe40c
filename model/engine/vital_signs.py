"""When a rank has hung. Seconds and what the ranks say in, a verdict out; knows no processes.

A rank hangs when its process is stopped, a kernel never ends, or hidden states never arrive. Being
slow is not hanging: on a CPU one layer may take minutes. So what counts is
- that a rank answers when it is asked. A thread of its own does so at once, whatever the rank is
  at, loading its weights and compiling kernels included.
- that it comes on: its progress grows with every part of a layer that it hands to the device (with
  every decode step, where that is replayed as a whole) and with every microbatch that the device
  has finished. On CPU it grows also with the CPU time of the thread that works: what computes uses
  it, however slowly, and what waits for ever does not. (On CUDA that would say nothing: a host that
  waits for its GPU spins.) While Triton compiles a kernel it cannot be seen, and nothing counts.
A rank that waits for another, or for work, is excused as long as any rank comes on.
"""

from collections.abc import Sequence

from model.engine.messages import Alive

# Times as patient with one that has never answered: it imports torch, maybe from a cold disk.
_FOR_THE_FIRST_ANSWER = 10


class VitalSigns:
    """Of one rank: `silent` and `still` count seconds for which the coordinator waited for it."""

    def __init__(self) -> None:
        self.silent = self.still = 0.0
        self.last: Alive | None = None

    def passed(self, seconds: float) -> None:
        self.silent += seconds
        self.still += seconds

    def heard(self, alive: Alive) -> None:
        self.silent = 0.0
        if self.last is None or alive.progress is None or alive.progress != self.last.progress:
            self.still = 0.0
        self.last = alive

    @property
    def waits(self) -> bool:
        return self.last is None or self.last.waits

    def is_mute(self, patience: float) -> bool:
        return self.silent > patience * (1 if self.last else _FOR_THE_FIRST_ANSWER)

    @property
    def was(self) -> str:
        """What it was doing when it was last heard of."""
        return self.last.doing if self.last else "starting"


def hung(ranks: Sequence[VitalSigns], patience: float) -> dict[int, str]:
    """Which ranks have hung, after `patience` seconds, and how, in words; only those to blame, if
    that can be told. Empty when none has."""
    mute = [i for i, signs in enumerate(ranks) if signs.is_mute(patience)]
    if mute:
        return {i: f"no answer for {ranks[i].silent:.0f} s, was {ranks[i].was}" for i in mute}
    still = [i for i, signs in enumerate(ranks) if signs.last and signs.still > patience]
    to_blame = [i for i in still if not ranks[i].waits]
    if len(still) == len(ranks):
        to_blame = to_blame or still
    return {i: f"no progress for {ranks[i].still:.0f} s, is {ranks[i].was}" for i in to_blame}
