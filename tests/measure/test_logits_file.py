"""Saved logits: written, read, cut off and damaged."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest

from moelocal.errors import MoelocalError
from moelocal.measure.divergence import encode
from moelocal.measure.logits_file import (
    LogitsWriter,
    SavedLogits,
    Shape,
    chunks_there,
    is_logits_file,
    part_of,
)
from moelocal.measure.perplexity import Layout, score

SHAPE = Shape(Layout(n_ctx=8, n_chunks=3), n_vocab=11)
TOKENS = array("i", [i % 11 for i in range(30)])


def rows(chunk: int) -> tuple[np.ndarray, np.ndarray]:
    logits = np.random.default_rng(chunk).normal(size=(3, 11)).astype(np.float32)
    scores = score(logits, np.zeros(3, dtype=np.int32))
    return encode(logits, scores.log_sum), scores.nll.astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.logits"
    with LogitsWriter(path, SHAPE, TOKENS) as writer:
        for chunk in range(3):
            writer.write(rows(chunk)[0])
        writer.finish(np.concatenate([rows(chunk)[1] for chunk in range(3)]))
    return path


def test_what_was_written_is_read(file: Path) -> None:
    assert is_logits_file(file) and not part_of(file).exists()
    with SavedLogits(file) as saved:
        assert (saved.shape, saved.n_whole, saved.tokens) == (SHAPE, 3, TOKENS[:24])
        found = saved.rows(1, 1, [0, 0])
        assert np.array_equal(found.words, rows(1)[0][1:]) and found.nll is not None
        assert np.array_equal(found.nll, rows(1)[1][1:])


def test_a_full_disk_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x.logits"
    part_of(path).symlink_to("/dev/full")
    wanted = pytest.raises(MoelocalError, match=f"written to {part_of(path)}: No space")
    with wanted, LogitsWriter(path, SHAPE, TOKENS) as writer:
        writer.write(rows(0)[0])
        writer.flush()


def test_the_format_is_llama_perplexitys(file: Path) -> None:
    data = file.read_bytes()
    assert data[:20] == b"_logits_" + np.array([8, 11, 3], "<i4").tobytes()
    assert data[20:116] == TOKENS[:24].tobytes()
    n_rows, width = 9, 2 * 6 + 4
    assert data[116 : 116 + 32] == rows(0)[0][0].tobytes() and SHAPE.n_bytes == 116 + n_rows * width * 2
    file.write_bytes(data[: SHAPE.n_bytes])  # as llama-perplexity ends it
    with SavedLogits(file) as saved:
        assert saved.rows(2, 0, [0, 0, 0]).nll is None


def test_one_that_was_interrupted_goes_on(file: Path) -> None:
    whole = file.read_bytes()
    for n_done in range(4):
        part_of(file).write_bytes(whole[: SHAPE.data_offset + n_done * SHAPE.chunk_bytes + 5])
        assert chunks_there(file, SHAPE, TOKENS) == n_done
        with LogitsWriter(file, SHAPE, TOKENS, n_done) as writer:
            for chunk in range(n_done, 3):
                writer.write(rows(chunk)[0])
            writer.finish(np.concatenate([rows(chunk)[1] for chunk in range(3)]))
        assert file.read_bytes() == whole
    part_of(file).write_bytes(whole)
    assert chunks_there(file, SHAPE, array("i", [1] * 30)) == 0


@pytest.mark.parametrize("size", [0, 7, 19, 20, 60, 116, 200])
def test_cut_off(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(MoelocalError, match=r"no file of saved logits|cut off"):
        SavedLogits(file)


def test_cut_off_in_a_later_chunk(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: SHAPE.data_offset + SHAPE.chunk_bytes + 9])
    with SavedLogits(file) as saved:
        assert saved.n_whole == 1
        with pytest.raises(MoelocalError, match="ends within chunk 2"):
            saved.rows(1, 0, [0, 0, 0])


@pytest.mark.parametrize(
    ("offset", "bad"),
    [(8, b"\xff\xff\xff\xff"), (8, b"\0\0\0\0"), (12, b"\xff\xff\xff\x7f"), (16, b"\0\0\0\0"), (20, b"\x0b\0\0\0")],
)
def test_a_damaged_head(file: Path, offset: int, bad: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[offset : offset + 4] = bad
    file.write_bytes(data)
    with pytest.raises(MoelocalError, match="damaged"):
        SavedLogits(file)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf")])
def test_a_damaged_row(file: Path, bad: float) -> None:
    data = bytearray(file.read_bytes())
    data[116:120] = np.array(bad, "<f4").tobytes()
    file.write_bytes(data)
    with SavedLogits(file) as saved, pytest.raises(MoelocalError, match="damaged in chunk 1"):
        saved.rows(0, 0, [0, 0, 0])


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(MoelocalError, match="cannot be written"):
        LogitsWriter(tmp_path / "no" / "x.logits", SHAPE, TOKENS)
