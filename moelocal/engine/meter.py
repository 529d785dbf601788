"""What an answer measures beside its own clock, and that it is kept: for the next plan of this model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moelocal.engine.conversation import Delta
    from moelocal.engine.session import Session
    from moelocal.engine.timings import Timings
    from moelocal.machine.hardware import Machine

_STALL_S = 0.02  # to show a piece takes less; and what it takes is part of the speed that people see


class Meter:
    """Goes with one session. `watch` each answer while it streams; `keep` when it has been shown, cut short or not.

    `away_s` are the seconds in which whoever reads the stream held it up for long: a pager, a stopped terminal.
    """

    def __init__(self, path: Path, machine: Machine, session: Session) -> None:
        self.path, self.machine, self.session = path, machine, session
        self.away_s = 0.0
        self._before: Timings | None = None

    def watch(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        """The same deltas."""
        clock, self.away_s, self._before = time.perf_counter, 0.0, self.session.timings
        for delta in deltas:
            given = clock()
            yield delta
            held_s = clock() - given
            self.away_s += held_s if held_s > _STALL_S else 0.0

    @property
    def timings(self) -> Timings | None:
        """Those of the answer that was watched; None if it did not come so far."""
        timings = self.session.timings
        return None if timings is self._before else timings

    def keep(self) -> None:
        """Keeps what was measured, once; what cannot be written is not missed."""
        if self.timings is not None:
            from moelocal.engine.history import remember

            remember(self)
            self._before = self.session.timings
