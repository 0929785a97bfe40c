"""Ends a process whose engine hangs in it, as a kernel that never ends makes it: an engine of one
rank computes in the caller's own thread. Ranks in other processes are watched by their engine, and
here it is seen that it does so. Where no thread of this process runs, guard.py ends it."""

import logging
import os
import threading
import time
from collections.abc import Callable

from model.engine.engine import Engine
from model.engine.vital_signs import VitalSigns, hung

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN = 1.0  # two looks


class Watchdog:
    """A context in which `engine` has something to do; for one thread, again and again.

    patience: seconds, as EngineConfig.hang_seconds. ends: is told why, before the process exits.
    """

    def __init__(self, engine: Engine, patience: float, ends: Callable[[str], None]) -> None:
        self._engine = engine
        self._patience = patience
        self._ends = ends
        self._entered = 0
        self._inside = False
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def __enter__(self) -> None:
        self._entered += 1
        self._inside = True

    def __exit__(self, *_: object) -> None:
        self._inside = False

    def _look(self) -> None:
        signs, entered = VitalSigns(), 0
        while True:
            time.sleep(_SECONDS_BETWEEN)
            if not self._inside or self._entered != entered:
                signs, entered = VitalSigns(), self._entered
                continue
            signs.passed(_SECONDS_BETWEEN)
            signs.heard(self._engine.alive)
            if found := hung([signs], self._patience):
                logger.error("the engine hangs: %s; this replica is started again", found[0])
                self._ends(f"the engine hung: {found[0]}")
                os._exit(1)
