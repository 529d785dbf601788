"""Ranges of a model's files as pages of memory: where they are mapped, whether they are there, read and given back.

A page of 4 KiB costs the processor about 1.2 µs to be read, 0.4 to be mapped when it is first touched and 1.1 to be
given back; a block of 2 MiB that the page cache holds as one costs a fifth of that to read and next to nothing after.
Asked for in advance, Linux reads single pages only. Where a mapping that asks for huge pages is touched, it reads
blocks, if the file system has them (XFS, ext4 since Linux 6.16). So whole blocks of a run are read through such a
mapping, several at once. Each comes marked for reading on from there when it is touched, which llama.cpp's mapping is
told not to do. A block of which a part is given back is split first; the rest of it stays.

Source: mm/filemap.c `do_sync_mmap_readahead` (VM_HUGEPAGE); mm/madvise.c `madvise_cold_or_pageout_pte_range` (a folio
of which only a part is meant is split); proc_pid_smaps(5), FilePmdMapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moelocal.engine import mapped
from moelocal.engine.libc import COLD, DONT_NEED, HUGE_PAGE, NORMAL, PAGE_BYTES, POPULATE_READ, RANDOM, libc
from moelocal.engine.readahead import ReadAhead, fetch
from moelocal.model.slices import Range

Block = tuple[int, int]  # shard, number
BLOCK_BYTES = 2 << 20
_AT_ONCE = 4  # blocks: enough in flight for a disk, and they wait for it most of the time


class Pages:
    """The files of a model that is loaded. Close it with the model."""

    def __init__(self, paths: Sequence[Path], ahead: ReadAhead) -> None:
        self._ahead = ahead
        self._maps = [mapped.mappings(path) for path in paths]
        self._sizes = [os.fstat(file).st_size for file in ahead.files]
        self._views: list[int] = []  # addresses of the mappings that read in blocks
        self._blocks: set[Block] = set()  # that were read as one and are not known to have been split
        self._pool: ThreadPoolExecutor | None = None
        self._calmed: list[tuple[int, int]] = []  # addresses, sizes: what llama.cpp touches without reading on

    @property
    def is_mapped(self) -> bool:
        """Whether the system says where the files are mapped."""
        return any(self._maps)

    @property
    def in_blocks(self) -> bool:
        """Whether runs are read in blocks."""
        return self._pool is not None

    def close(self) -> None:
        """Ends the threads and takes the mappings for blocks away."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        for view, size in zip(self._views, self._sizes, strict=False):  # fewer, if mapping failed
            libc().munmap(view, size)
        self._views.clear()
        while self._calmed:
            libc().madvise(*self._calmed.pop(), NORMAL)

    def address(self, one: Range, share: float = 0.0) -> int | None:
        """Where a range is mapped, or the byte after that share of it; None: it is not."""
        address = mapped.within(self._maps[one.shard], one.offset, one.n_bytes)
        return None if address is None else address + int(share * one.n_bytes)

    def is_cached(self, address: int) -> bool:
        """Whether the page of a mapped address is in memory; True where the system does not say."""
        page = ctypes.c_ubyte(1)
        libc().mincore(address & -PAGE_BYTES, 1, ctypes.byref(page))
        return bool(page.value & 1)

    def lock(self, one: Range) -> bool:
        """Keeps a range in memory, if the system allows it."""
        address = self.address(one)
        return address is not None and not libc().mlock(address, one.n_bytes)

    def use_blocks(self, ranges: Iterable[Range]) -> bool:
        """Looks, by reading a block of these ranges that is not in memory, whether blocks come as one, and has runs
        read so from then on if they do."""
        ranges = list(ranges)
        trial = next((found for one in ranges for found in _whole_blocks(one) if not self._is_any_cached(found)), None)
        if trial is None or not self._map():
            return False
        if not self._populate(trial) or not _has_huge_pages(self._views[trial[0]]):
            self.close()
            return False
        self._blocks.add(trial)
        self._let_go(trial)
        for one in ranges:
            first, last = self._whole_pages(one)
            if first < last and not libc().madvise(first, last - first, RANDOM):
                self._calmed.append((first, last - first))
        self._pool = ThreadPoolExecutor(_AT_ONCE, "pages")
        return True

    def read(self, run: Range) -> None:
        """Has a run read. In blocks: returns when they are there; else when all is asked for."""
        blocks = list(_whole_blocks(run)) if self._pool else []
        if not self._pool or not blocks:
            fetch(self._ahead.pieces(*run))
            return
        first, last = blocks[0][1] * BLOCK_BYTES, (blocks[-1][1] + 1) * BLOCK_BYTES
        fetch(self._ahead.pieces(run.shard, run.offset, first - run.offset))
        fetch(self._ahead.pieces(run.shard, last, run.offset + run.n_bytes - last))
        done = self._pool.map(self._read_block, blocks)
        self._blocks.update(block for block, is_read in zip(blocks, done, strict=True) if is_read)

    def free(self, run: Range) -> None:
        """Takes a run out of memory, but for pages that it shares with others."""
        first, last = self._whole_pages(run)
        if first >= last:
            return
        if self._blocks:
            self._split_edges(run)
        libc().madvise(first, last - first, DONT_NEED)
        os.posix_fadvise(self._ahead.files[run.shard], run.offset, run.n_bytes, os.POSIX_FADV_DONTNEED)

    # -- blocks -----------------------------------------------------------------------------------------------------

    def _map(self) -> bool:
        for file, size in zip(self._ahead.files, self._sizes, strict=True):
            view = libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
            if view in (None, ctypes.c_void_p(-1).value):
                break
            self._views.append(view)
            if libc().madvise(view, size, HUGE_PAGE) or libc().madvise(view, size, RANDOM):
                break
        else:
            return True
        self.close()
        return False

    def _populate(self, block: Block) -> bool:
        """Waits until the view has a block. Says whether it has it; a disk that fails raises no signal here."""
        shard, number = block
        return not libc().madvise(self._views[shard] + number * BLOCK_BYTES, BLOCK_BYTES, POPULATE_READ)

    def _read_block(self, block: Block) -> bool:
        is_read = self._populate(block)
        self._let_go(block)
        return is_read

    def _let_go(self, block: Block) -> None:
        """Takes a block out of the view. The page cache keeps it, and can split it: no one else has it mapped."""
        shard, number = block
        libc().madvise(self._views[shard] + number * BLOCK_BYTES, BLOCK_BYTES, DONT_NEED)

    def _is_any_cached(self, block: Block) -> bool:
        shard, number = block
        address = self.address(Range(shard, number * BLOCK_BYTES, BLOCK_BYTES))
        pages = (ctypes.c_ubyte * (BLOCK_BYTES // PAGE_BYTES))()
        if address is None or libc().mincore(address & -PAGE_BYTES, BLOCK_BYTES, pages):
            return True
        return any(page & 1 for page in pages)

    def _split_edges(self, run: Range) -> None:
        """Splits the blocks at a run's ends of which it has a part only. They must be mapped for that."""
        end = run.offset + run.n_bytes
        for number in {run.offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES}:
            if (run.shard, number) not in self._blocks:
                continue
            self._blocks.discard((run.shard, number))
            start = max(run.offset, number * BLOCK_BYTES)
            first, last = self._whole_pages(Range(run.shard, start, min(end, (number + 1) * BLOCK_BYTES) - start))
            if 0 < last - first < BLOCK_BYTES and self.is_cached(first):
                libc().madvise(first, PAGE_BYTES, POPULATE_READ)
                libc().madvise(first, last - first, COLD)

    def _whole_pages(self, run: Range) -> tuple[int, int]:
        """The address of the first page that lies within a run, and of the first after it that does not."""
        address = self.address(run)
        if address is None:
            return 0, 0
        return -(-address // PAGE_BYTES) * PAGE_BYTES, (address + run.n_bytes) // PAGE_BYTES * PAGE_BYTES


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as few ranges, in order."""
    found: list[Range] = []
    for one in sorted(ranges):
        if found and found[-1].shard == one.shard and found[-1].offset + found[-1].n_bytes == one.offset:
            found[-1] = found[-1]._replace(n_bytes=found[-1].n_bytes + one.n_bytes)
        else:
            found.append(one)
    return found


def _whole_blocks(run: Range) -> Iterator[Block]:
    """Those that lie within a run."""
    first, last = -(-run.offset // BLOCK_BYTES), (run.offset + run.n_bytes) // BLOCK_BYTES
    return ((run.shard, number) for number in range(first, last))


def _has_huge_pages(address: int) -> bool:
    """Whether the mapping that begins there has pages of 2 MiB."""
    try:
        rows = Path("/proc/self/smaps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    at = next((i for i, row in enumerate(rows) if row.startswith(f"{address:x}-")), len(rows))
    found = next((row for row in rows[at:] if row.startswith("FilePmdMapped:")), "FilePmdMapped: 0 kB")
    return int(found.split()[1]) > 0
