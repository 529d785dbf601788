"""Memory made present ahead of its use: as large as expected, contents untouched, and stopped when told."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from moelocal.engine.prefault import _mappings, prefaulting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
N_BYTES = 64 << 20


def seen_all(fraction: float) -> bool:
    return fraction < 1.0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def wait_until_present(least_bytes: int) -> bool:
    import time

    deadline = time.monotonic() + 20
    while resident_bytes() < least_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    return resident_bytes() >= least_bytes


def fresh_memory() -> mmap.mmap:
    return mmap.mmap(-1, N_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_new_memory_becomes_present_with_its_contents() -> None:
    with prefaulting(seen_all) as progress:
        memory = fresh_memory()
        memory[:5], memory[-5:] = b"first", b"final"
        before = resident_bytes()
        assert progress(0.0) and not progress(1.0)
        present = wait_until_present(before + N_BYTES * 9 // 10)
    if not present:
        pytest.skip("this kernel does not populate memory on request")
    assert memory[:5] == b"first" and memory[-5:] == b"final" and not any(memory[1 << 20 : 2 << 20])


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


def test_huge_pages_where_the_system_allows_them() -> None:
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists() or "[madvise]" not in allowed.read_text():
        pytest.skip("this system decides about huge pages by itself")
    before = huge_bytes()
    found = {}
    for huge in (False, True):
        with prefaulting(seen_all, huge=huge) as progress:
            memory = fresh_memory()
            present = resident_bytes() + N_BYTES * 9 // 10
            progress(0.0)
            if not wait_until_present(present):
                pytest.skip("this kernel does not populate memory on request")
        found[huge] = huge_bytes() - before
        memory.close()
    assert found[False] < N_BYTES // 4 and (found[True] > N_BYTES // 4 or free_huge_bytes() < N_BYTES)


def free_huge_bytes() -> int:
    """Free memory in blocks of 2 MiB and more. Source: proc_buddyinfo(5)."""
    zones = (line.split() for line in Path("/proc/buddyinfo").read_text().splitlines())
    return sum(int(n) << (order + 12) for zone in zones for order, n in enumerate(zone[4:]) if order >= 9)


def test_what_was_there_before_and_what_nobody_asked_for_stays_as_it_is() -> None:
    memory = fresh_memory()
    before = resident_bytes()
    with prefaulting(seen_all) as progress:
        progress(0.0)
    with prefaulting(seen_all, wanted=False) as progress:
        other = fresh_memory()
        progress(0.0)
    with prefaulting(seen_all):
        third = fresh_memory()
    assert resident_bytes() < before + N_BYTES // 2
    assert len(memory) + len(other) + len(third) == 3 * N_BYTES


def test_only_large_private_memory_counts() -> None:
    before = _mappings()
    with fresh_memory() as memory, mmap.mmap(-1, N_BYTES) as shared:
        found = _mappings() - before
        assert sum(n_bytes for _, n_bytes in found) >= N_BYTES and len(memory) == len(shared)
