"""Whether heat or a power limit held the processor or a graphics card back meanwhile."""

from __future__ import annotations

from moelocal.machine.system import System

# Source: NVML, nvmlClocksEventReasons: hardware slowdown, software and hardware thermal slowdown, power brake
_NVIDIA_HOT = 0x8 | 0x20 | 0x40 | 0x80
_NVIDIA = ("nvidia-smi", "--query-gpu=index,clocks_throttle_reasons.active", "--format=csv,noheader")
_COUNTERS = "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"


class Throttling:
    """Watches from when it is made. Not confirmed on NVIDIA cards and Macs."""

    def __init__(self, here: System | None = None, has_nvidia: bool = False) -> None:
        self._here, self._has_nvidia = here or System(), has_nvidia
        self._before = self._count()

    def seen(self) -> tuple[str, ...]:
        """What was held back: `the processor`, `GPU 0`; empty where nothing was, or nothing is told."""
        found = ["the processor"] if self._count() > self._before or self._is_mac_slow() else []
        if self._has_nvidia:
            rows = (line.split(",") for line in self._here.run(_NVIDIA).splitlines() if line.count(",") == 1)
            found += [f"GPU {index.strip()}" for index, reasons in rows if _number(reasons) & _NVIDIA_HOT]
        return tuple(found)

    def _count(self) -> int:
        """How often Linux noted that a core was too hot.

        Source: kernel documentation, x86 thermal interrupts, /sys/devices/system/cpu/cpuN/thermal_throttle.
        """
        paths = self._here.find(_COUNTERS)
        return sum(self._here.number(str(path.relative_to(self._here.root))) or 0 for path in paths)

    def _is_mac_slow(self) -> bool:
        if self._here.platform != "darwin":
            return False
        lines = self._here.run(("pmset", "-g", "therm")).splitlines()
        limits = [line.rpartition("=")[2].strip() for line in lines if "CPU_Speed_Limit" in line]
        return any(limit.isdecimal() and int(limit) < 100 for limit in limits)


def _number(text: str) -> int:
    try:
        return int(text.strip(), 0)
    except ValueError:
        return 0
