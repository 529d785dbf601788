"""Files read ahead: on this system, and by Windows' call, played by a stand-in that reads what it is told to."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from moelocal.engine import mapped, readahead
from moelocal.engine.readahead import ReadAhead, fetch
from moelocal.engine.residency import Residency
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import load
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan

STREAMED = Plan(
    n_ctx=256, kv_type="f16", n_ubatch=64, threads=1, n_gpu_layers=0, repack=False, load_mode="mmap", disk_bytes=1,
)  # fmt: skip


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What Windows was asked to read, range by range."""
    read: list[bytes] = []

    def prefetch(process: int, n_ranges: int, ranges: ctypes.Array[ctypes.Structure], flags: int) -> int:
        assert process == 7 and flags == 0 and n_ranges == len(ranges) > 0
        words = memoryview(bytes(ranges)).cast("Q")
        read.extend(ctypes.string_at(words[at], words[at + 1]) for at in range(0, len(words), 2))
        return 1

    kernel = SimpleNamespace(GetCurrentProcess=lambda: 7, PrefetchVirtualMemory=prefetch)
    monkeypatch.setattr(readahead, "_PLATFORM", "win32")
    monkeypatch.setattr(readahead, "_kernel32", lambda: kernel)
    monkeypatch.setattr(mapped, "mappings", lambda _: [])
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    return read


@pytest.mark.parametrize("n_bytes", [1, 4096, 5_000_000])
def test_pieces_cover_a_range_in_order(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(6_000_000))
    ahead = ReadAhead([path])
    pieces = ahead.pieces(0, 1000, n_bytes)
    assert sum(size for _, _, size in pieces) == n_bytes and pieces[0][1] == 1000
    assert all(a[1] + a[2] == b[1] for a, b in pairwise(pieces))
    fetch(pieces)
    ahead.wait(0, 1000 + n_bytes - 1)
    ahead.wait(0, 10_000_000)  # no such byte
    ahead.close()


def test_windows_is_asked_for_ranges_of_each_file(tmp_path: Path, windows: list[bytes]) -> None:
    paths = [tmp_path / name for name in ("first", "second")]
    contents = [random.Random(seed).randbytes(5_000_000) for seed in range(2)]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    assert ReadAhead.is_possible()
    ahead = ReadAhead(paths)
    fetch([*ahead.pieces(0, 5, 4_000_000), *ahead.pieces(1, 77, 1000)])
    ahead.wait(1, 1077)
    ahead.close()
    assert windows == [contents[0][5 : 5 + 4_000_000], contents[1][77:1077]]


def test_a_model_is_streamed_by_windows_call(tiny: Callable[[str], Path], windows: list[bytes]) -> None:
    path = tiny("tiny-qwen3moe")
    with load([path], read_header(path), STREAMED) as session:
        assert isinstance(session.residency, Residency)
        session.residency._most_bytes = 1
        session.residency._limit()
        n_before = len(windows)
        settings = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
        assert sum(chunk.token is not None for chunk in session.stream([5, 6, 7], settings)) == 8
        session.residency.commit()  # raises if the nodes could not be read
        assert session.residency.stats.n_misses > 0 and len(windows) > n_before
