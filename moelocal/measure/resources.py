"""Memory and page faults of this process while something is measured."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil


class Resources:
    """Watches from when it is made."""

    def __init__(self) -> None:
        with suppress(OSError):  # the peak counts from now on; Source: proc(5), /proc/pid/clear_refs
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._faults = _faults()

    @property
    def major_faults(self) -> int:
        """Pages that had to be read from disk since then; 0 where the system does not count them."""
        return _faults() - self._faults

    @property
    def peak_bytes(self) -> int:
        """The most RAM that this process had, mapped weights included: since then on Linux, ever on other systems."""
        with suppress(OSError, ValueError, IndexError):
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            return int(status.split("VmHWM:")[1].split()[0]) << 10
        info = psutil.Process().memory_info()
        if sys.platform != "win32":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak << 10
        return int(getattr(info, "peak_wset", info.rss))


def _faults() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
