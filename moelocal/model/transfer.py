"""One local file from the hub: over several lines where that helps, resumable at any byte, checked before it is there.

While it grows, the file is called NAME.moelocal.incomplete and has its full length, then a table: for each piece how
many of its bytes have come. Bytes are written before they are counted, so a process that is killed loses the work of a
moment. A thread of its own computes the checksum as far as the file is whole. Only what has the hub's checksum and a
usable GGUF header gets its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moelocal.errors import BadGGUF, MoelocalError
from moelocal.model.cache import PARTIAL
from moelocal.model.client import HubError
from moelocal.model.header import parse_header
from moelocal.model.hub import HubFile
from moelocal.model.ranges import RemoteFile

_MOST_LINES = 4
_GOOD_LINE_BYTES_PER_S = 40e6  # a line as fast as that is held up by this computer, and more of them would not help
_TRIED_S = 0.5
_PIECE_BYTES = 32 << 20
_HASHED_BYTES = 1 << 20
_TICK_S = 0.1
_PATIENCE_S = 1.0
_COUNT = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Target:
    """A local file to be, and the remote files that it is made of, one after the other (one, unless it was cut up)."""

    path: Path
    files: tuple[HubFile, ...]

    @property
    def n_bytes(self) -> int:
        """Its size when it is whole."""
        return sum(file.n_bytes for file in self.files)

    @property
    def is_there(self) -> bool:
        """Whether it is complete."""
        with contextlib.suppress(OSError):
            return self.path.stat().st_size == self.n_bytes
        return False

    @property
    def partial(self) -> Path:
        """What it is called before."""
        return self.path.with_name(self.path.name + PARTIAL)


class Piece(NamedTuple):
    """A range of one remote file, and where it goes."""

    file: int
    start: int
    end: int
    offset: int

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return self.end - self.start


def pieces_of(target: Target) -> list[Piece]:
    """The pieces that a file is fetched in; they depend on nothing but the files."""
    pieces = []
    base = 0
    for index, file in enumerate(target.files):
        for start in range(0, file.n_bytes, _PIECE_BYTES):
            pieces.append(Piece(index, start, min(start + _PIECE_BYTES, file.n_bytes), base + start))
        base += file.n_bytes
    return pieces


def bytes_here(target: Target) -> int:
    """How much of a file has been fetched already."""
    if target.is_there:
        return target.n_bytes
    return sum(_read_counts(target, pieces_of(target)) or ())


def _read_counts(target: Target, pieces: list[Piece]) -> list[int] | None:
    """For each piece how many bytes are here; None: there is no file to resume."""
    try:
        with target.partial.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == target.n_bytes:  # killed after the last byte
                return [piece.n_bytes for piece in pieces]
            file.seek(target.n_bytes)
            table = file.read()
    except OSError:
        return None
    if len(table) != _COUNT.size * len(pieces):
        return None
    counts = [count for (count,) in _COUNT.iter_unpack(table)]
    return counts if all(count <= piece.n_bytes for count, piece in zip(counts, pieces, strict=True)) else None


class Transfer:
    """The fetching of one file. `run` returns when it is there; `n_done` grows meanwhile."""

    def __init__(self, target: Target, repo: str, commit: str) -> None:
        self.target = target
        self._pieces = pieces_of(target)
        self._counts = _read_counts(target, self._pieces)
        self._remotes = [RemoteFile(repo, commit, file) for file in target.files]
        self._lock = threading.Lock()
        self._next = 0
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._digests: list[str] = []

    @property
    def n_done(self) -> int:
        """Bytes that are here."""
        return sum(self._counts or ())

    def run(self, on_progress: Callable[[int], None]) -> None:
        """Fetches what is missing, checks all of it, and gives the file its name.

        Args:
            on_progress: gets the number of bytes that are here, several times a second, in this thread.

        Raises:
            HubError: the hub refuses, or sent other bytes than it says.
            BadGGUF: it sent what it says, but that is no usable GGUF file.
            OSError: the disk is full, or cannot be written.
        """
        if self._counts is None:
            self._probe(self._remotes[0])  # a refusal leaves no file
            self._counts = [0] * len(self._pieces)
            with self.target.partial.open("wb") as file:
                file.truncate(self.target.n_bytes + _COUNT.size * len(self._pieces))
        checker = self._start(self._hash)
        lines = [self._start(self._fetch)]
        since, before = time.monotonic(), self.n_done
        try:
            while checker.is_alive() and self._failure is None:
                checker.join(_TICK_S)
                done, now = self.n_done, time.monotonic()
                on_progress(done)
                if len(lines) < _MOST_LINES and now - since >= _TRIED_S:
                    if (done - before) / (now - since) < len(lines) * _GOOD_LINE_BYTES_PER_S:
                        lines.append(self._start(self._fetch))
                    since, before = now, done
        finally:
            self._give_up()
        for thread in (checker, *lines):
            thread.join(_PATIENCE_S)  # a line may hang, and is left to itself
        if self._failure is not None:
            raise self._failure
        self._finish()

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
        thread.start()
        return thread

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failure = self._failure or error
            self._give_up()

    def _give_up(self) -> None:
        self._stop.set()
        for remote in self._remotes:
            remote.stop.set()

    def _fetch(self) -> None:
        """One line: takes the next piece, until there is none."""
        with self.target.partial.open("r+b", buffering=0) as out:
            while not self._stop.is_set() and (index := self._claim()) is not None:
                piece, remote = self._pieces[index], self._remotes[self._pieces[index].file]
                done = self._count(index)
                for data in remote.pieces(piece.start + done, piece.end):
                    _write_at(out, piece.offset + done, data)
                    done += len(data)
                    _write_at(out, self.target.n_bytes + index * _COUNT.size, _COUNT.pack(done))
                    self._set_count(index, done)
                    if self._stop.is_set():
                        return

    def _count(self, index: int) -> int:
        assert self._counts is not None
        return self._counts[index]

    def _set_count(self, index: int, done: int) -> None:
        assert self._counts is not None
        self._counts[index] = done

    def _claim(self) -> int | None:
        """The next piece that is not whole; None: all are taken."""
        with self._lock:
            while self._next < len(self._pieces):
                index = self._next
                self._next += 1
                if self._count(index) < self._pieces[index].n_bytes:
                    self._probe(self._remotes[self._pieces[index].file])
                    return index
        return None

    def _probe(self, remote: RemoteFile) -> None:
        """Before the first piece of a file: learns where it is, and that the server sends parts of it."""
        if remote.is_known:
            return
        remote.probe()
        if not remote.sends_parts:
            raise HubError(
                f"{remote.file.path.rpartition('/')[2]} comes from a server that sends whole files only.",
                f"Check HF_ENDPOINT and the proxy, or try: hf download {remote.repo} {remote.file.path}",
            )

    def _whole_bytes(self) -> int:
        """How many bytes from the beginning on are here."""
        n_bytes = 0
        for index, piece in enumerate(self._pieces):
            n_bytes += self._count(index)
            if self._count(index) < piece.n_bytes:
                break
        return n_bytes

    def _hash(self) -> None:
        """The checksum of each file, computed as it comes."""
        with self.target.partial.open("rb", buffering=0) as stream:
            base = 0
            for file in self.target.files:
                digest = _hasher(file)
                at, end = base, base + file.n_bytes
                while at < end:
                    ready = min(end, self._whole_bytes())
                    if ready <= at:
                        if self._stop.wait(_TICK_S / 4):
                            return
                        continue
                    while at < ready and not self._stop.is_set():
                        data = stream.read(min(_HASHED_BYTES, ready - at))
                        digest.update(data)
                        at += len(data)
                self._digests.append(digest.hexdigest())
                base = end

    def _finish(self) -> None:
        """Checks what came, and gives it its name."""
        target = self.target
        for file, digest in zip(target.files, self._digests, strict=True):
            if digest != file.digest:
                target.partial.unlink(missing_ok=True)
                raise HubError(
                    f"{file.path.rpartition('/')[2]} came damaged: its checksum begins with {digest[:12]}, that of the"
                    f" hub with {file.digest[:12]}. It was removed.",
                    "Pull it again. If that happens twice, a proxy or this computer's memory may be at fault.",
                )
        name = target.files[0].path.rpartition("/")[2]
        try:
            if ".gguf" in name.lower():  # and not the files of a checkpoint
                with target.partial.open("rb") as stream:
                    parse_header(stream, target.n_bytes, name)
        except BadGGUF as error:
            target.partial.unlink(missing_ok=True)
            raise unusable(error) from error
        with target.partial.open("r+b") as out:
            out.truncate(target.n_bytes)
        os.replace(target.partial, target.path)


def unusable(error: BadGGUF, n_files: int = 1) -> MoelocalError:
    """What came as the hub has it, and is no model all the same; it is removed."""
    if n_files == 1:
        text = f"The file is on the hub as it came here, but cannot be used: {error.message}. It was removed."
    else:
        text = f"The {n_files} files are on the hub as they came here, but no model together: {error.message}."
        text += " They were removed."
    return MoelocalError(text, "Choose another quantization, or another repository.")


def _hasher(file: HubFile) -> Any:
    """The hub's checksum of a file: SHA-256 or, for small files without LFS, that of a git blob."""
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.n_bytes, usedforsecurity=False)


def _write_at(out: BinaryIO, offset: int, data: bytes) -> None:
    out.seek(offset)
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
