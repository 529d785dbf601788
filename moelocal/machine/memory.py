"""RAM: what is there, what a container leaves of it, what is swapped out. All sizes in bytes."""

from __future__ import annotations

from typing import NamedTuple

from moelocal.machine.system import System, control_groups


class Ram(NamedTuple):
    """`total_bytes` and `free_bytes` respect the container's limit; `installed_bytes` is what the kernel has."""

    total_bytes: int
    free_bytes: int
    installed_bytes: int
    swapped_bytes: int = 0


def read_ram(here: System) -> Ram:
    """RAM that this process may use, and how much of it is free or would be freed for it."""
    lines = (line.split() for line in here.read("proc/meminfo").splitlines())
    info = {parts[0].rstrip(":"): int(parts[1]) << 10 for parts in lines if len(parts) > 1 and parts[1].isdecimal()}
    if "MemTotal" in info and "MemAvailable" in info:
        installed, free = info["MemTotal"], info["MemAvailable"]
        swapped = info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    else:
        import psutil  # 10 ms: not on Linux

        memory = psutil.virtual_memory()
        installed, free, swapped = memory.total, memory.available, _swapped()
    total = installed
    for limit, used in limits(here):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Ram(total, free, installed, swapped)


def _swapped() -> int:
    import psutil

    try:
        return psutil.swap_memory().used
    except (OSError, RuntimeError):  # performance counters are off on Windows, or a sandbox
        return 0


def limits(here: System) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every control group around this process that has a limit.

    `used` leaves out page cache that the kernel would give back, as a memory-mapped model is just that; shared memory
    and locked pages stay counted.
    Source: kernel documentation, admin-guide/cgroup-v2 (memory.max, memory.current, memory.stat) and cgroup-v1/memory.
    """
    found = []
    for folder, version in control_groups(here, "memory"):
        names = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
        limit, used = here.number(f"{folder}/memory.{names[0]}"), here.number(f"{folder}/memory.{names[1]}")
        if limit is None or used is None or limit >= 1 << 60:  # v1's word for none is a number of 19 digits
            continue
        rows = (line.split() for line in here.read(f"{folder}/memory.stat").splitlines())
        stat = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}
        cache = sum(stat.get(f"{names[2]}{kind}_file", 0) for kind in ("active", "inactive"))
        found.append((limit, max(0, used - cache)))
    return found
