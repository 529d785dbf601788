"""How busy other programs keep the processor while something is measured here."""

from __future__ import annotations

import os

import psutil

BUSY_SHARE = 0.2  # more, and figures are worse than estimates


class OtherWork:
    """Watches from when it is made."""

    def __init__(self) -> None:
        self._start = _seconds()

    def share(self) -> float:
        """The share of all processors' time that others took since then, 0.0 to 1.0."""
        idle_s, own_s, all_s = (now - then for now, then in zip(_seconds(), self._start, strict=True))
        return float(min(1.0, max(0.0, (all_s - idle_s - own_s) / max(0.1, all_s))))


def _seconds() -> tuple[float, float, float]:
    """Seconds of all processors that were idle, used by this process and its children, and there were."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    # a guest's time is counted in user and nice already
    all_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    own = os.times()
    return idle_s, own.user + own.system + own.children_user + own.children_system, all_s
