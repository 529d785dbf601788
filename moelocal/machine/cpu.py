"""The processor: how many cores should compute, what they are called, what they can do.

One thread per physical performance core is what llama.cpp wants: a second thread on a core, or a slow core that all
others wait for, makes every token slower.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from moelocal.machine.system import System, control_groups

_SLOW_SHARE = 0.7  # a core with less than this share of the fastest one's capacity only holds the others up
_X86 = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi2": "bmi2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512vbmi": "avx512_vbmi",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
_ARM = {
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
_APPLE = {
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_FP16": "fp16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.f16c": "f16c",
    "hw.optional.avx512f": "avx512f",
}
_WINDOWS = {39: "avx", 40: "avx2", 41: "avx512f", 19: "neon", 43: "dotprod"}  # PF_*_AVAILABLE of winnt.h


class Cores(NamedTuple):
    """Counts of cores. `usable`: performance cores that this process may keep busy; `affinity` and `quota` are what the
    scheduler's mask and the container's CPU limit leave, in cores."""

    usable: int
    performance: int
    physical: int
    logical: int
    affinity: int
    quota: float | None = None


def count_cores(here: System) -> Cores:
    """Counts the cores, and those that should compute."""
    if here.platform == "linux" and (online := cpu_list(here.read("sys/devices/system/cpu/online"))):
        core_of = {cpu: _core(here, cpu) for cpu in online}
        fast = _fast_cpus(here, online)
        allowed = [cpu for cpu in online if cpu in here.allowed] or online
        affinity = len({core_of[cpu] for cpu in allowed})
        best = {core_of[cpu] for cpu in allowed if cpu in fast}
        physical, performance = len(set(core_of.values())), len({core_of[cpu] for cpu in fast})
        usable, logical = len(best) or affinity, len(online)
    else:
        physical, performance, logical = _counted_elsewhere(here)
        usable, affinity = performance, physical
    quota = _quota(here)
    if quota is not None:
        usable = min(usable, int(quota))  # rounded down: a throttled thread stops all others at every barrier
    return Cores(max(1, usable), performance, physical, logical, affinity, quota)


def cpu_list(text: str) -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8], as the kernel writes sets of CPUs; [] when it is no such list."""
    found: list[int] = []
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if match is None:
            return []
        found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def _core(here: System, cpu: int) -> str:
    """The same text for all hardware threads of one core."""
    topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
    siblings = here.read(f"{topology}/core_cpus_list") or here.read(f"{topology}/thread_siblings_list")
    return siblings.strip() or str(cpu)


def _fast_cpus(here: System, online: list[int]) -> set[int]:
    """The CPUs of performance cores; all of them where the cores are alike.

    Source: kernel documentation, ABI/testing/sysfs-devices-system-cpu (cpu_capacity), sysfs-bus-event_source-devices
    (cpu_core on Intel's hybrids).
    """
    if intel := set(cpu_list(here.read("sys/devices/cpu_core/cpus"))) & set(online):
        return intel
    for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        ratings = {cpu: here.number(f"sys/devices/system/cpu/cpu{cpu}/{file}") or 0 for cpu in online}
        most = max(ratings.values())
        if most > 0 and min(ratings.values()) > 0:
            return {cpu for cpu, rating in ratings.items() if rating >= _SLOW_SHARE * most}
    return set(online)


def _quota(here: System) -> float | None:
    """The smallest CPU limit, in cores, of the control groups around this process."""
    found = []
    for folder, version in control_groups(here, "cpu"):
        if version == 2:
            quota, _, period = here.read(f"{folder}/cpu.max").strip().partition(" ")
        else:
            quota = here.read(f"{folder}/cpu.cfs_quota_us").strip()
            period = here.read(f"{folder}/cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _counted_elsewhere(here: System) -> tuple[int, int, int]:
    """(physical, performance, logical) where Linux's files are not."""
    if here.platform == "win32" and (table := _windows_table()):
        return windows_cores(table)
    import psutil

    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    performance = here.run(["sysctl", "-n", "hw.perflevel0.physicalcpu"]) if here.platform == "darwin" else ""
    return physical, int(performance) if performance.strip().isdecimal() else physical, logical


def windows_cores(table: bytes) -> tuple[int, int, int]:
    """(physical, performance, logical) from Windows' table of cores: those of the highest efficiency class are fast.

    Source: winnt.h, SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX with PROCESSOR_RELATIONSHIP, 64 bits: relationship, size,
    flags, efficiency class, 20 reserved bytes, number of groups, then 16 bytes per group that begin with a mask.
    """
    classes, logical, offset = [], 0, 0
    while offset + 48 <= len(table):
        size, efficiency, n_groups = struct.unpack_from("<4xIxB20xH", table, offset)
        classes.append(efficiency)
        masks = (struct.unpack_from("<Q", table, offset + 32 + 16 * group)[0] for group in range(n_groups))
        logical += sum(mask.bit_count() for mask in masks)
        offset += max(size, 48)
    return len(classes), classes.count(max(classes, default=0)), logical


def _windows_table() -> bytes:
    import sys

    if sys.platform != "win32":
        return b""
    import ctypes

    ask, size, cores_only = ctypes.windll.kernel32.GetLogicalProcessorInformationEx, ctypes.c_ulong(), 0
    ask(cores_only, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    return buffer.raw if ask(cores_only, buffer, ctypes.byref(size)) else b""


def cpu_name(here: System, told: str = "") -> str:
    """The processor's name, short. `told` is llama.cpp's, which has no name for many ARM boards."""
    name = told if told not in ("", "CPU") else ""
    name = name or here.read("proc/device-tree/model").strip("\x00\n ") or here.arch or "unknown"
    name = re.sub(r"\((R|TM|tm|r)\)|[®™]| CPU(?= |$)| Processor| \d+-Core|@.*| with Radeon.*| w/ Radeon.*", "", name)
    return " ".join(name.split())


def cpu_features(here: System) -> tuple[str, ...]:
    """The instruction sets that matter to llama.cpp, in its order of speed; empty where the system does not tell."""
    if here.platform == "linux":
        head = here.read("proc/cpuinfo", 1 << 14)
        match = re.search(r"^(flags|Features)\s*: (.*)$", head, re.MULTILINE)
        flags = set(match[2].split()) if match else set()
        names = _X86 if match and match[1] == "flags" else _ARM
        return tuple(dict.fromkeys(name for flag, name in names.items() if flag in flags))
    if here.platform == "darwin":
        # the whole branch: asked for a name that this version does not know, sysctl fails
        told = dict(line.split(": ", 1) for line in here.run(["sysctl", "hw.optional"]).splitlines() if ": " in line)
        neon = ("neon",) if here.arch == "arm64" else ()
        return neon + tuple(name for key, name in _APPLE.items() if told.get(key) == "1")
    return _windows_features()


def _windows_features() -> tuple[str, ...]:
    import sys

    if sys.platform != "win32":
        return ()
    import ctypes

    present = ctypes.windll.kernel32.IsProcessorFeaturePresent
    return tuple(name for number, name in _WINDOWS.items() if present(number))
