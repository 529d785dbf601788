"""Memory that llama.cpp is about to fill with repacked weights is made present by a second core meanwhile.

Fresh memory costs a page fault for every 4 KiB that is first written: of a load that copies, about a third of the time.
llama.cpp allocates its buffers, then reports progress for the first time, then copies on one core; from that report on
a thread here asks the kernel for the pages, in order, a piece at a time. Their contents are not touched. Pages of 2 MiB
save the processor address translations in every token; some virtual machines take longer to find them.

Source: madvise(2), MADV_HUGEPAGE and MADVPOPULATE_WRITE (Linux 5.14); a kernel that refuses costs nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moelocal.engine.libc import HUGE_PAGE, POPULATE_WRITE, libc

Progress = Callable[[float], bool]
_LEAST_BYTES = 32 << 20
_PIECE_BYTES = 8 << 20


@contextmanager
def prefaulting(progress: Progress, wanted: bool = True, huge: bool = False) -> Iterator[Progress]:
    """Gives a callback that does what `progress` does, and from its first call on populates memory as well.

    Populated is what is large, writable, anonymous and newer than the context, until the context ends; in huge pages if
    `huge` and the system allows them.
    """
    if not wanted or sys.platform != "linux":
        yield progress
        return
    before, ended = _mappings(), threading.Event()
    threads: list[threading.Thread] = []

    def first_begin(fraction: float) -> bool:
        if not threads:
            fresh = sorted(_mappings() - before)
            threads.append(threading.Thread(target=_populate, args=(fresh, huge, ended), name="prefault", daemon=True))
            threads[0].start()
        return progress(fraction)

    try:
        yield first_begin
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _mappings() -> set[tuple[int, int]]:
    """First address and length of each large, private, writable mapping without a file.

    Source: proc_pid_maps(5).
    """
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_, name = f"{line} -".split(maxsplit=5)
        start, end = (int(address, 16) for address in span.split("-"))
        if rights == "rw-p" and name == "-" and end - start >= _LEAST_BYTES:
            found.add((start, end - start))
    return found


def _populate(mappings: list[tuple[int, int]], huge: bool, ended: threading.Event) -> None:
    madvise = libc().madvise
    for start, n_bytes in mappings:
        if huge:
            madvise(start, n_bytes, HUGE_PAGE)
        for offset in range(0, n_bytes, _PIECE_BYTES):
            if ended.is_set() or madvise(start + offset, min(_PIECE_BYTES, n_bytes - offset), POPULATE_WRITE):
                return
