"""The C library's calls on mapped memory, typed.

Source: madvise(2), mincore(2), mlock(2), mprotect(2), mmap(2).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache
from typing import Any

DONT_NEED, PAGE_OUT, HUGE_PAGE, POPULATE_WRITE = 4, 21, 14, 23  # of madvise, Linux
PAGE_BYTES = mmap.PAGESIZE


@lru_cache(maxsize=1)
def libc() -> Any:
    """The handle; not on Windows."""
    handle = ctypes.CDLL(None, use_errno=True)
    for name in ("mlock", "munlock"):
        getattr(handle, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for name in ("madvise", "mprotect"):
        getattr(handle, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    handle.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    handle.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    handle.mmap.restype = ctypes.c_void_p
    return handle
