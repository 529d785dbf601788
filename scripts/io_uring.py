"""Linux' io_uring by bare system calls, as far as comparing ways to read needs it: a burst is submitted in one call,
and waited for.

Source: Linux, include/uapi/linux/io_uring.h (io_uring_params, io_uring_sqe, io_uring_cqe), io_uring_setup(2),
io_uring_enter(2). The numbers of the calls are the same on all architectures.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence

READ, FADVISE = 22, 24  # enum io_uring_op
_SETUP, _ENTER, _GETEVENTS = 425, 426, 1
_SQ_RING, _SQES = 0, 0x10000000
_PARAMS_BYTES, _SQE_BYTES, _CQE_BYTES = 120, 64, 16

Entry = tuple[int, int, int, int, int, int]  # operation, file, offset, address, bytes, flags or advice


class Ring:
    """For up to `n` operations at once. Raises OSError where the system does not allow it."""

    def __init__(self, n: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        params = ctypes.create_string_buffer(_PARAMS_BYTES)
        self._file = self._call(_SETUP, n, params)
        n_sq, n_cq = struct.unpack_from("2I", params)
        _, self._sq_tail, self._sq_mask, _, _, _, array = struct.unpack_from("7I", params, 40)
        self._cq_head, self._cq_tail, self._cq_mask, _, _, self._cqes = struct.unpack_from("6I", params, 80)
        n_bytes = max(array + 4 * n_sq, self._cqes + _CQE_BYTES * n_cq)
        self._rings = mmap.mmap(self._file, n_bytes, offset=_SQ_RING)
        self._sqes = mmap.mmap(self._file, _SQE_BYTES * n_sq, offset=_SQES)
        struct.pack_into(f"{n_sq}I", self._rings, array, *range(n_sq))

    def run(self, entries: Sequence[Entry]) -> list[int]:
        """Submits all, waits for all; gives what each returned, in the order in which they ended."""
        tail, mask = self._word(self._sq_tail), self._word(self._sq_mask)
        for at, (operation, file, offset, address, n_bytes, flags) in enumerate(entries, tail):
            fields = operation, 0, 0, file, offset, address, n_bytes, flags
            struct.pack_into("<BBHiQQII32x", self._sqes, (at & mask) * _SQE_BYTES, *fields)
        struct.pack_into("I", self._rings, self._sq_tail, (tail + len(entries)) & 0xFFFFFFFF)
        self._call(_ENTER, self._file, len(entries), len(entries), _GETEVENTS, None, 0)
        head, mask = self._word(self._cq_head), self._word(self._cq_mask)
        found = [
            int(struct.unpack_from("i", self._rings, self._cqes + (at & mask) * _CQE_BYTES + 8)[0])
            for at in range(head, head + len(entries))
        ]
        struct.pack_into("I", self._rings, self._cq_head, (head + len(entries)) & 0xFFFFFFFF)
        return found

    def _word(self, offset: int) -> int:
        return int(struct.unpack_from("I", self._rings, offset)[0])

    def _call(self, number: int, *arguments: object) -> int:
        result = int(self._libc.syscall(number, *arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result
