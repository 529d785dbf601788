"""Pieces of a file read into the system's page cache without waiting for them, many at once.

Source: posix_fadvise(2), POSIX_FADV_WILLNEED: reads what is not cached yet, at most the larger of the device's
read-ahead and its largest request per call (mm/readahead.c `force_page_cache_ra`). Darwin, fcntl(2), F_RDADVISE.
Windows, memoryapi.h, PrefetchVirtualMemory: reads ranges of a mapping, each of any size, into physical memory, where
other mappings of the file find them too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

_LEAST_PIECE_BYTES, _MOST_PIECE_BYTES = 128 << 10, 2 << 20
_F_RDADVISE = 44  # Source: Darwin, sys/fcntl.h, struct radvisory
_PLATFORM = sys.platform

Piece = tuple[int, int, int]  # file descriptor, or on Windows where the file is mapped; offset; bytes


class ReadAhead:
    """A checkpoint's files, opened for being read ahead. Close it when the model goes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) for path in paths]
        self._views: list[mmap.mmap] = []
        if _PLATFORM == "win32":
            self._views = [mmap.mmap(file, 0, access=mmap.ACCESS_READ) for file in self.files]
            self._places, self._piece_bytes = [_address(view) for view in self._views], [sys.maxsize] * len(self.files)
        else:
            self._places, self._piece_bytes = list(self.files), [piece_bytes(file) for file in self.files]

    @staticmethod
    def is_possible() -> bool:
        """Whether this system can be asked to read ahead."""
        return hasattr(os, "posix_fadvise") or _PLATFORM in ("darwin", "win32")

    def pieces(self, shard: int, offset: int, n_bytes: int) -> tuple[Piece, ...]:
        """A range as pieces of which the system takes each in one call."""
        most = self._piece_bytes[shard]
        end = offset + n_bytes
        return tuple((self._places[shard], at, min(most, end - at)) for at in range(offset, end, most))

    def wait(self, shard: int, offset: int) -> None:
        """Returns when that byte of a file is there, or cannot be read."""
        with suppress(OSError):
            if self._views:
                self._views[shard][offset]
            else:
                os.pread(self.files[shard], 1, offset)

    def close(self) -> None:
        """Closes the files."""
        while self._views:
            self._views.pop().close()
        while self.files:
            os.close(self.files.pop())


def fetch(pieces: Iterable[Piece]) -> None:
    """Has pieces read, in this order; returns when all are asked for, or none can be (the file's disk is gone)."""
    try:
        if _PLATFORM == "win32":
            _prefetch(pieces)
        elif sys.platform == "darwin":
            import fcntl

            for file, offset, n_bytes in pieces:
                fcntl.fcntl(file, _F_RDADVISE, struct.pack("qi4x", offset, n_bytes))
        else:
            advise, will_need = os.posix_fadvise, os.POSIX_FADV_WILLNEED
            for file, offset, n_bytes in pieces:
                advise(file, offset, n_bytes, will_need)
    except OSError:
        return


class _MemoryRange(ctypes.Structure):
    """Source: memoryapi.h, WIN32_MEMORY_RANGE_ENTRY."""

    _fields_ = [("address", ctypes.c_void_p), ("n_bytes", ctypes.c_size_t)]


@lru_cache(maxsize=1)
def _kernel32() -> Any:
    handle = getattr(ctypes, "WinDLL")("kernel32")  # noqa: B009  where there is one
    handle.GetCurrentProcess.restype = ctypes.c_void_p
    handle.PrefetchVirtualMemory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint32]
    return handle


def _prefetch(pieces: Iterable[Piece]) -> None:
    ranges = [_MemoryRange(address + offset, n_bytes) for address, offset, n_bytes in pieces]
    process = _kernel32().GetCurrentProcess()
    _kernel32().PrefetchVirtualMemory(process, len(ranges), (_MemoryRange * len(ranges))(*ranges), 0)


def _address(view: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(view, np.uint8).ctypes.data)


def piece_bytes(file: int) -> int:
    """How much of a file one call reads ahead at most.

    Source: Documentation/ABI/stable/sysfs-block: queue/read_ahead_kb, queue/max_sectors_kb.
    """
    try:
        device = os.fstat(file).st_dev
        name = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
        folder = Path(os.path.realpath(name))
        queue = folder / "queue" if (folder / "queue").is_dir() else folder.parent / "queue"  # a partition has none
        kib = max(int((queue / key).read_text()) for key in ("read_ahead_kb", "max_sectors_kb"))
    except (OSError, ValueError, AttributeError):
        return _LEAST_PIECE_BYTES
    return min(max(kib << 10, _LEAST_PIECE_BYTES), _MOST_PIECE_BYTES)
