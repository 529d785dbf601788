"""The saved-logits file of llama-perplexity (`--kl-divergence-base`), read and written, so that files are exchangeable.

    8 bytes "_logits_", then int32 n_ctx, n_vocab, n_chunks, little-endian
    int32[n_chunks * n_ctx]        the text's tokens
    uint16[n_rows, row_words]      of each chunk: its scored positions (see perplexity.py, divergence.py)
    8 bytes "_lnprob_", float32[n_chunks * n_rows]    only in ours, where llama-perplexity does not look: exact -ln p of
                                                      the text's tokens, also of those below what 16 bits can say

Written beside its place as `NAME.part`, whole chunks at a time, and renamed when complete: an interrupted one goes on.

Source: llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp: perplexity(), kl_divergence().
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from moelocal.errors import MoelocalError
from moelocal.measure.divergence import HEAD_WORDS, Saved, row_words
from moelocal.measure.perplexity import Layout
from moelocal.units import format_bytes

if TYPE_CHECKING:
    from moelocal.measure.divergence import Words
    from moelocal.measure.perplexity import Floats

MAGIC, _EXACT = b"_logits_", b"_lnprob_"
_HEAD = struct.Struct("<8siii")
_MAKE = "Make it again: moelocal eval MODEL --text FILE --save-logits FILE"
_MOST_CTX, _MOST_VOCAB = 1 << 24, 1 << 24


class Shape(NamedTuple):
    """What a file holds."""

    layout: Layout
    n_vocab: int

    @property
    def data_offset(self) -> int:
        """Where the first chunk begins."""
        return _HEAD.size + 4 * self.layout.n_ctx * self.layout.n_chunks

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's rows."""
        return 2 * row_words(self.n_vocab) * self.layout.n_rows

    @property
    def n_bytes(self) -> int:
        """The whole file."""
        return self.data_offset + self.chunk_bytes * self.layout.n_chunks


def is_logits_file(path: Path) -> bool:
    """Whether a file begins as such a file does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class SavedLogits:
    """An open file of saved logits; a context manager. `shape` and `tokens` say what is in it."""

    def __init__(self, path: Path) -> None:
        """Opens and checks it.

        Raises:
            MoelocalError: no such file, another kind of file, or a damaged one.
        """
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise MoelocalError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
        try:
            self.shape, self.n_whole = self._read_head()
            self.tokens = self._read_tokens()
        except BaseException:
            self._file.close()
            raise

    def _read_head(self) -> tuple[Shape, int]:
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size or head[: len(MAGIC)] != MAGIC:
            raise MoelocalError(f"{self.path} is no file of saved logits.", _MAKE)
        _, n_ctx, n_vocab, n_chunks = _HEAD.unpack(head)
        if not (2 < n_ctx <= _MOST_CTX and 0 < n_vocab <= _MOST_VOCAB and n_chunks > 0):
            raise MoelocalError(
                f"{self.path} is damaged: it claims {n_chunks:,} chunks of {n_ctx:,} tokens, of {n_vocab:,} kinds.",
                _MAKE,
            )
        shape = Shape(Layout(n_ctx, n_chunks), n_vocab)
        n_bytes = os.fstat(self._file.fileno()).st_size
        return shape, min(n_chunks, (n_bytes - shape.data_offset) // shape.chunk_bytes)

    def _read_tokens(self) -> array[int]:
        layout = self.shape.layout
        if self.n_whole < 1:
            raise MoelocalError(f"{self.path} is cut off: it holds not one of its {layout.n_chunks:,} chunks.", _MAKE)
        tokens = array("i", self._file.read(4 * layout.n_ctx * layout.n_chunks))
        if min(tokens) < 0 or max(tokens) >= self.shape.n_vocab:
            raise MoelocalError(f"{self.path} is damaged: it holds tokens that its vocabulary does not have.", _MAKE)
        return tokens

    def _exact(self, chunk: int, start: int, n: int) -> Floats | None:
        """Exact -ln p of the same rows, if they were kept: float32[n]."""
        import numpy as np

        self._file.seek(self.shape.n_bytes)
        if self._file.read(len(_EXACT)) != _EXACT:
            return None
        self._file.seek(4 * (chunk * self.shape.layout.n_rows + start), os.SEEK_CUR)
        data = self._file.read(4 * n)
        values = np.frombuffer(data, "<f4") if len(data) == 4 * n else None
        return values if values is not None and np.isfinite(values).all() else None

    def rows(self, chunk: int, start: int, targets: Sequence[int]) -> Saved:
        """Saved rows of a chunk, from `start` on, one for each target.

        Raises:
            MoelocalError: the file ends before, or holds what cannot be.
        """
        import numpy as np

        n, width = len(targets), row_words(self.shape.n_vocab)
        self._file.seek(self.shape.data_offset + chunk * self.shape.chunk_bytes + start * 2 * width)
        data = self._file.read(n * 2 * width)
        if len(data) < n * 2 * width:
            raise MoelocalError(f"{self.path} ends within chunk {chunk + 1:,}.", _MAKE)
        words = np.frombuffer(data, "<u2").reshape(n, width)
        head = np.ascontiguousarray(words[:, :HEAD_WORDS]).view("<f4")
        if not (np.isfinite(head).all() and (head[:, 0] >= 0).all() and (head[:, 1] <= 0).all()):
            raise MoelocalError(f"{self.path} is damaged in chunk {chunk + 1:,}.", _MAKE)
        return Saved(words, self._exact(chunk, start, n))

    def __enter__(self) -> SavedLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class LogitsWriter:
    """Writes such a file, chunk after chunk; a context manager. Rows of one chunk may come in several pieces."""

    def __init__(self, path: Path, shape: Shape, tokens: Sequence[int], n_done: int = 0) -> None:
        """Starts the file, or goes on after the chunks that are there already.

        Args:
            n_done: chunks to keep of an interrupted one; see `chunks_there`.

        Raises:
            MoelocalError: it cannot be written.
        """
        self.path, self._part, self._shape = path, part_of(path), shape
        try:
            self._file = self._part.open("r+b" if n_done else "wb")
            if n_done:
                self._file.truncate(shape.data_offset + n_done * shape.chunk_bytes)
                self._file.seek(0, os.SEEK_END)
            else:
                layout = shape.layout
                self._file.write(_HEAD.pack(MAGIC, layout.n_ctx, shape.n_vocab, layout.n_chunks))
                array("i", tokens[: layout.n_ctx * layout.n_chunks]).tofile(self._file)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, words: Words) -> None:
        """Adds rows: uint16[n, row_words].

        Raises:
            MoelocalError: the disk is full.
        """
        try:
            self._file.write(words.tobytes())
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Hands everything to the system: from here on it survives the end of this process.

        Raises:
            MoelocalError: the disk is full.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def finish(self, nll: Floats) -> None:
        """Adds exact -ln p of all scored tokens, and gives the complete file its name.

        Raises:
            MoelocalError: the disk is full.
        """
        try:
            self._file.write(_EXACT + nll.astype("<f4").tobytes())
            self._file.close()
            os.replace(self._part, self.path)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> MoelocalError:
        return MoelocalError(
            f"The logits cannot be written to {self._part}: {error.strerror}.",
            f"They take {format_bytes(self._shape.n_bytes)} there; fewer --chunks take less.",
        )

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what a full disk did not take was told by `write`, `flush` or `finish`
            self._file.close()


def part_of(path: Path) -> Path:
    """Where a file is while it is not complete."""
    return path.with_name(path.name + ".part")


def chunks_there(path: Path, shape: Shape, tokens: Sequence[int]) -> int:
    """Whole chunks in the unfinished file of this shape and text; 0: none, or another one's."""
    try:
        with SavedLogits(part_of(path)) as saved:
            n_tokens = shape.layout.n_ctx * shape.layout.n_chunks
            return saved.n_whole if saved.shape == shape and saved.tokens == array("i", tokens[:n_tokens]) else 0
    except MoelocalError:
        return 0
