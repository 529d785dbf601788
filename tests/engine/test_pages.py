"""Pages of a mapped file: what is read is there, what is given back is gone, and nothing else changes either."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moelocal.engine import pages as module
from moelocal.engine.libc import DONT_NEED, HUGE_PAGE, PAGE_BYTES, POPULATE_READ, libc
from moelocal.engine.pages import BLOCK_BYTES, Pages, joined
from moelocal.engine.readahead import ReadAhead
from moelocal.model.slices import Range

N_BLOCKS = 24
KIB = 1 << 10

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody says where a file is mapped")


class Opened:
    """A file of random bytes, mapped as llama.cpp maps one, and not in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = random.Random(1).randbytes(N_BLOCKS * BLOCK_BYTES + 5000)
        path.write_bytes(self.data)
        self.ahead = ReadAhead([path])
        self.map = libc().mmap(None, len(self.data), mmap.PROT_READ, mmap.MAP_SHARED, self.ahead.files[0], 0)
        self.drop()
        self.pages = Pages([path], self.ahead)

    def drop(self) -> None:
        os.fsync(self.ahead.files[0])
        libc().madvise(self.map, len(self.data), DONT_NEED)
        os.posix_fadvise(self.ahead.files[0], 0, 0, os.POSIX_FADV_DONTNEED)

    def there(self, run: Range) -> list[bool]:
        """Page by page, those that lie within the run."""
        first = -(-run.offset // PAGE_BYTES) * PAGE_BYTES
        n = max(0, (run.offset + run.n_bytes) // PAGE_BYTES - first // PAGE_BYTES)
        found = (ctypes.c_ubyte * n)()
        assert not libc().mincore(self.map + first, n * PAGE_BYTES, found)
        return [bool(page & 1) for page in found]

    def close(self) -> None:
        self.pages.close()
        self.ahead.close()
        libc().munmap(self.map, len(self.data))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    file = Opened(tmp_path / "file")
    if any(file.there(Range(0, 0, len(file.data)))):
        pytest.skip("this file system keeps the file in memory")
    yield file
    file.close()


def in_blocks(file: Opened) -> None:
    if not file.pages.use_blocks([Range(0, 0, len(file.data))]):
        pytest.skip("this system reads no blocks")
    file.drop()


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], []),
        ([(0, 10, 5)], [(0, 10, 5)]),
        ([(0, 15, 5), (0, 10, 5)], [(0, 10, 10)]),
        ([(0, 10, 5), (0, 16, 5)], [(0, 10, 5), (0, 16, 5)]),
        ([(0, 10, 5), (1, 15, 5)], [(0, 10, 5), (1, 15, 5)]),
        ([(1, 0, 5), (0, 0, 5), (0, 5, 5), (0, 10, 1)], [(0, 0, 11), (1, 0, 5)]),
    ],
)
def test_neighbours_are_joined(ranges: list[tuple[int, int, int]], expected: list[tuple[int, int, int]]) -> None:
    assert joined(Range(*one) for one in ranges) == [Range(*one) for one in expected]


RUNS = [
    Range(0, 0, BLOCK_BYTES),
    Range(0, 3 * BLOCK_BYTES - 300 * KIB, 700 * KIB),  # no whole block
    Range(0, 5 * BLOCK_BYTES + 12345, 4 * BLOCK_BYTES),
    Range(0, 12 * BLOCK_BYTES - PAGE_BYTES, BLOCK_BYTES + 2 * PAGE_BYTES),
]


@pytest.mark.parametrize("blocks", [False, True], ids=["pages", "blocks"])
def test_what_is_read_is_there_and_right_and_what_is_given_back_is_gone(opened: Opened, blocks: bool) -> None:
    if blocks:
        in_blocks(opened)
    assert opened.pages.in_blocks == blocks
    for run in RUNS:
        opened.pages.read(run)
        assert ctypes.string_at(opened.map + run.offset, run.n_bytes) == opened.data[run.offset :][: run.n_bytes]
        assert all(opened.there(run))
    for run in RUNS:
        opened.pages.free(run)
        assert not any(opened.there(run))


def test_whole_blocks_come_as_one(opened: Opened) -> None:
    in_blocks(opened)
    run = Range(0, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES)
    opened.pages.read(run)
    ctypes.string_at(opened.map + run.offset, run.n_bytes)  # touched
    if opened.map % BLOCK_BYTES == 0:
        assert module._has_huge_pages(opened.map)
    opened.pages.free(run)
    assert not module._has_huge_pages(opened.map)


def test_of_a_block_a_part_can_go_and_the_rest_stays(opened: Opened) -> None:
    in_blocks(opened)
    part = 700 * KIB + 123  # three experts and a bit in a block
    experts = [Range(0, BLOCK_BYTES + i * part, part) for i in range(20)]
    opened.pages.read(joined(experts)[0])
    gone = [experts[i] for i in (0, 3, 4, 5, 11, 19)]
    for run in joined(gone):
        opened.pages.free(run)
    for one in experts:
        assert not any(opened.there(one)) if one in gone else all(opened.there(one))
        assert ctypes.string_at(opened.map + one.offset, part) == opened.data[one.offset :][:part]


@pytest.mark.parametrize("missing", [HUGE_PAGE, POPULATE_READ, None], ids=["huge pages", "populate-read", "blocks"])
def test_a_system_without_such_blocks_reads_pages(
    opened: Opened, missing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = Range(0, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES), libc().madvise
    if missing is None:
        monkeypatch.setattr(module, "_has_huge_pages", lambda _: False)
    else:
        monkeypatch.setattr(libc(), "madvise", lambda a, n, advice: -1 if advice == missing else real(a, n, advice))
    assert not opened.pages.use_blocks([run]) and not opened.pages.in_blocks
    opened.drop()
    opened.pages.read(run)
    assert ctypes.string_at(opened.map + run.offset, 100) == opened.data[run.offset :][:100]
    assert all(opened.there(run._replace(n_bytes=PAGE_BYTES)))


def test_too_small_or_cached_already_is_not_tried(opened: Opened) -> None:
    assert not opened.pages.use_blocks([Range(0, 0, BLOCK_BYTES - 1), Range(0, 100, BLOCK_BYTES)])
    ctypes.string_at(opened.map, 2 * BLOCK_BYTES)
    assert not opened.pages.use_blocks([Range(0, 0, 2 * BLOCK_BYTES)])
