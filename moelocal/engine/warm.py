"""Reads a model into the page cache before llama.cpp maps it, with progress and Ctrl-C.

llama.cpp maps with MAP_POPULATE: of a file that is not cached yet, all is read inside one system call, before its first
progress report. What is cached already is not read again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moelocal.engine.libc import libc

_BLOCK_BYTES = 16 << 20
_CACHED_ENOUGH = 0.98
_STRIDE_BYTES, _SAMPLE_BYTES = 2 << 20, 128 << 10


def warm(paths: Sequence[Path], progress: Callable[[float], bool]) -> None:
    """Reads the files that are not in the page cache, in order.

    Args:
        progress: called with 0.0 to 1.0; returning False stops.
    """
    cold = [path for path in paths if cached_share(path) < _CACHED_ENOUGH]
    total = sum(path.stat().st_size for path in cold)
    block, done = bytearray(_BLOCK_BYTES), 0
    for path in cold:
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(block):
                done += n
                if not progress(min(1.0, done / total)):
                    return


def cached_share(path: Path) -> float:
    """How much of a file the kernel holds in its page cache, 0.0 to 1.0; 1.0 where it cannot be asked.

    Of every `_STRIDE_BYTES` the first `_SAMPLE_BYTES` are looked at: the kernel reads ahead in pieces no smaller.

    Source: mincore(2).
    """
    n_bytes = path.stat().st_size
    if sys.platform != "linux" or not n_bytes:
        return 1.0
    mincore = libc().mincore
    n_cached = n_pages = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        start = ctypes.c_char.from_buffer(mapping)
        pages = (ctypes.c_ubyte * (_SAMPLE_BYTES // mmap.PAGESIZE))()
        for at in range(0, n_bytes, _STRIDE_BYTES):
            length = min(_SAMPLE_BYTES, n_bytes - at)
            if mincore(ctypes.addressof(start) + at, length, pages):
                break
            n_here = -(-length // mmap.PAGESIZE)
            n_pages += n_here
            n_cached += bytes(pages[:n_here]).translate(_LOW_BIT).count(1)
        del start  # else the mapping cannot be closed
    return n_cached / n_pages if n_pages else 1.0


_LOW_BIT = bytes(value & 1 for value in range(256))
