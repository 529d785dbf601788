"""The C library's calls on mapped memory, typed.

Source: madvise(2), mincore(2), mlock(2), mprotect(2), mmap(2).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache
from typing import Any

NORMAL, RANDOM, DONT_NEED, HUGE_PAGE, COLD = 0, 1, 4, 14, 20  # of madvise, Linux
PAGE_OUT, POPULATE_READ, POPULATE_WRITE = 21, 22, 23
PAGE_BYTES = mmap.PAGESIZE


@lru_cache(maxsize=1)
def libc() -> Any:
    """The handle; not on Windows."""
    handle = ctypes.CDLL(None, use_errno=True)
    for name in ("mlock", "munlock", "munmap"):
        getattr(handle, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for name in ("madvise", "mprotect"):
        getattr(handle, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    handle.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    handle.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    handle.mmap.restype = ctypes.c_void_p
    return handle
