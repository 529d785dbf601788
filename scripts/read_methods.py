"""How a burst of experts gets from the disk into the page cache: compares ways to ask for it.

A burst is what one token may miss: ranges of 1.2 MB at random places of a file, dropped from the page cache before. It
ends when all of them can be read from memory. Ways, in turns, each in every round:

- advised: posix_fadvise(WILLNEED), in pieces of 2 MiB; one thread, which then waits. moelocal's.
- advised, 256 KiB: the same in smaller pieces.
- populated, N threads: madvise(MADV_POPULATE_READ) on a mapping.
- read, N threads: pread into a buffer that nobody looks at.
- io_uring, read; io_uring, advised: all ranges in one call, read into buffers or advised; where the system allows it.
- touched: page by page in the mapping, as llama.cpp does when nobody helps.

Printed: the burst's time as a ratio to `advised` of the same round, median (smallest to largest), and the CPU's time,
user and system together, as a ratio likewise. Read-ahead is what the disk has set; laptops have 128 KiB.

usage: python scripts/read_methods.py FILE.gguf [--rounds 9] [--ranges 21]
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import io_uring

RANGE_BYTES = 2048 * 1024 * 9 // 16  # an expert's gate in OLMoE, Q4_K
PIECE_BYTES, SMALL_BYTES = 2 << 20, 256 << 10
POPULATE_READ = 22  # Source: Linux, include/uapi/asm-generic/mman-common.h
THREADS = (2, 4, 8)
Burst = Callable[[Sequence[int]], None]


def methods(file: int, size: int, n_ranges: int) -> dict[str, Burst]:
    """Each way by name: a function of the ranges' offsets."""
    view = mmap.mmap(file, size, prot=mmap.PROT_READ)
    address = _address(size)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def advised(piece_bytes: int) -> Burst:
        def burst(offsets: Sequence[int]) -> None:
            for offset in offsets:
                for at in range(offset, offset + RANGE_BYTES, piece_bytes):
                    os.posix_fadvise(file, at, min(piece_bytes, offset + RANGE_BYTES - at), os.POSIX_FADV_WILLNEED)
            for offset in offsets:
                os.pread(file, 1, offset + RANGE_BYTES - 1)

        return burst

    def populate(offset: int) -> None:
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if libc.madvise(address + first, offset + RANGE_BYTES - first, POPULATE_READ):
            raise OSError(ctypes.get_errno(), "madvise(MADV_POPULATE_READ)")

    def read(offset: int) -> None:
        os.pread(file, RANGE_BYTES, offset)

    def threaded(work: Callable[[int], None], n: int) -> Burst:
        pool = ThreadPoolExecutor(n)
        return lambda offsets: list(pool.map(work, offsets)).clear()

    def touched(offsets: Sequence[int]) -> None:
        for offset in offsets:
            for at in range(offset, offset + RANGE_BYTES, mmap.PAGESIZE):
                view[at]

    found = {"advised": advised(PIECE_BYTES), "advised, 256 KiB": advised(SMALL_BYTES)}
    for n in THREADS:
        found[f"populated, {n} threads"] = threaded(populate, n)
        found[f"read, {n} threads"] = threaded(read, n)
    with suppress(OSError):
        found |= _by_ring(file, n_ranges)
    return {**found, "touched": touched}


def _by_ring(file: int, n_ranges: int) -> dict[str, Burst]:
    ring = io_uring.Ring(n_ranges)
    buffers = [ctypes.create_string_buffer(RANGE_BYTES) for _ in range(n_ranges)]

    def done(operation: int, offsets: Sequence[int], flags: int) -> None:
        entries = [
            (operation, file, offset, ctypes.addressof(buffer), RANGE_BYTES, flags)
            for offset, buffer in zip(offsets, buffers, strict=True)
        ]
        if min(ring.run(entries)) < 0:
            raise SystemExit("io_uring failed")

    def advised(offsets: Sequence[int]) -> None:
        done(io_uring.FADVISE, offsets, os.POSIX_FADV_WILLNEED)
        for offset in offsets:
            os.pread(file, 1, offset + RANGE_BYTES - 1)

    return {"io_uring, read": lambda offsets: done(io_uring.READ, offsets, 0), "io_uring, advised": advised}


def _address(size: int) -> int:
    """Where the mapping of a file of this size begins."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(word, 16) for word in line.split()[0].split("-"))
        if last - first >= size and ".gguf" in line:
            return first
    raise SystemExit("the mapping is not in /proc/self/maps")


def timed(file: int, burst: Burst, offsets: Sequence[int]) -> tuple[float, float]:
    """Seconds, and the CPU's, of one burst that finds nothing in memory."""
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    burst(offsets)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranges", type=int, default=21)
    args = parser.parse_args()
    file = os.open(args.file, os.O_RDONLY)
    size = os.fstat(file).st_size
    ways = methods(file, size, args.ranges)
    noise, found = random.Random(1), {name: list[tuple[float, float]]() for name in ways}
    for i in range(args.rounds):
        for name in sorted(ways, key=lambda _: noise.random()):
            offsets = [noise.randrange(size - RANGE_BYTES) for _ in range(args.ranges)]
            found[name].append(timed(file, ways[name], offsets))
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
    print("| way | time | CPU |\n|---|---:|---:|")
    for name, values in found.items():
        columns = (
            sorted(one[which] / first[which] for one, first in zip(values, found["advised"], strict=True))
            for which in (0, 1)
        )
        cells = (f"{statistics.median(one):.2f} ({one[0]:.2f} to {one[-1]:.2f})" for one in columns)
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
