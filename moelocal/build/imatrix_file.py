"""Importance matrices on disk: llama.cpp's GGUF format, read and written, and its older one (.dat), read.

    imatrix = read(path)
    imatrix.entries["blk.0.ffn_down_exps.weight"].means()      # float32[n_experts, n_inputs], for the quantizer

Source: llama.cpp 0c1e57098, tools/imatrix/imatrix.cpp `save_imatrix`, common/imatrix-loader.cpp,
tools/quantize/quantize.cpp `load_imatrix`.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from moelocal.errors import BadGGUF, MoelocalError
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moelocal.model.header import GGUFHeader

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAGIC = b"GGUF"
_ANEW = "Make it anew: moelocal imatrix MODEL --force; or go without: --imatrix none"
_MOST_ENTRIES, _MOST_NAME_BYTES = 100_000, 4096  # of an older file: more is something else


@dataclass(frozen=True, slots=True)
class Importance:
    """One weight tensor's: `sums` float32[n_matrices, n_inputs] of its squared inputs, `counts` float32[n_matrices] of
    tokens. Experts are a matrix each; any other tensor is one."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    def means(self) -> NDArray[np.float32]:
        """float32[n_matrices, n_inputs]: what a quantizer weighs errors with; 1 where nothing was seen."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)

    @property
    def n_unseen(self) -> int:
        """Matrices that no token went through."""
        return int((self.counts == 0).sum())


@dataclass(frozen=True, slots=True)
class Imatrix:
    """A file: importances by the names of the weight tensors; the texts, `n_chunks` of `chunk_size` tokens (0: not
    known)."""

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)


def read(path: Path) -> Imatrix:
    """Reads a file of either format.

    Raises:
        MoelocalError: it is not there, is damaged, or is something else.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                stream.seek(0)
                return _finite(path, _read_older(path, stream))
    except OSError as error:
        raise MoelocalError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    except (struct.error, ValueError, EOFError) as error:
        raise _no_imatrix(path) from error
    try:
        header = read_header(path)
    except BadGGUF as error:
        raise MoelocalError(error.message, _ANEW) from error
    if header.metadata.get("general.type") != "imatrix":
        raise _no_imatrix(path)
    return _finite(path, _read_gguf(path, header))


def _finite(path: Path, imatrix: Imatrix) -> Imatrix:
    """An importance matrix with which llama.cpp's quantizer can compute.

    Raises:
        MoelocalError: it cannot.
    """
    for name, entry in imatrix.entries.items():
        if not np.isfinite(entry.sums).all():
            raise MoelocalError(f"{path.name} is damaged: for {name} it holds values that are no numbers.", _ANEW)
    return imatrix


def _read_gguf(path: Path, header: GGUFHeader) -> Imatrix:
    arrays: dict[str, NDArray[np.float32]] = {}
    with path.open("rb") as stream:
        for tensor in header.tensors:
            if GGML_TYPES[tensor.ggml_type].name != "F32":
                raise BadGGUF(f"{path.name}: {tensor.name} is not F32", tensor.offset, _ANEW)
            stream.seek(tensor.offset)
            arrays[tensor.name] = np.frombuffer(stream.read(tensor.n_bytes), np.float32)
    entries = {}
    for name, sums in arrays.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counts = arrays.get(weight + _COUNTS)
        if counts is None or not len(counts) or len(sums) % len(counts):
            raise _no_imatrix(path)
        entries[weight] = Importance(sums.reshape(len(counts), -1), counts)
    if not entries:
        raise _no_imatrix(path)
    datasets, keys = header.metadata.get("imatrix.datasets"), header.metadata
    n_chunks, chunk_size = (keys.get(f"imatrix.{key}", 0) for key in ("chunk_count", "chunk_size"))
    return Imatrix(
        entries,
        tuple(map(str, datasets or ())),
        n_chunks if isinstance(n_chunks, int) else 0,
        chunk_size if isinstance(chunk_size, int) else 0,
        {key: value for key, value in keys.items() if key.startswith("moelocal.") and isinstance(value, str)},
    )


def _read_older(path: Path, stream: BinaryIO) -> Imatrix:
    """Means times calls, one count for all experts; then calls and text, which may be missing."""

    def number() -> int:
        return int(struct.unpack("<i", stream.read(4))[0])

    def text(n: int) -> str:
        if not 0 <= n <= _MOST_NAME_BYTES:
            raise ValueError(n)
        return stream.read(n).decode()

    n_bytes, n_entries = os.fstat(stream.fileno()).st_size, number()
    if not 0 < n_entries <= _MOST_ENTRIES:
        raise ValueError(n_entries)
    entries = {}
    for _ in range(n_entries):
        name, n_calls, n_values = text(number()), number(), number()
        if not 0 < 4 * n_values <= n_bytes:
            raise ValueError(n_values)
        data = stream.read(4 * n_values)
        if len(data) < 4 * n_values:
            raise EOFError
        sums = np.frombuffer(data, "<f4").reshape(1, -1)
        entries[name] = Importance(sums, np.array([max(n_calls, 1)], np.float32))
    rest = stream.read(4)
    n_chunks = int(struct.unpack("<i", rest)[0]) if len(rest) == 4 else 0
    datasets = (text(number()),) if len(rest) == 4 and stream.tell() + 4 <= n_bytes else ()
    return Imatrix(entries, datasets, n_chunks)


def _no_imatrix(path: Path) -> MoelocalError:
    return MoelocalError(
        f"{path.name} is no importance matrix of llama.cpp, or is damaged.", "Make one: moelocal imatrix MODEL"
    )


def write(path: Path, imatrix: Imatrix) -> None:
    """Writes llama.cpp's GGUF format, tensors in the order of their names.

    Raises:
        OSError: no room, or no right to write.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    try:
        writer.kv_data[0].clear()  # no architecture
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.datasets))
        writer.add_uint32("imatrix.chunk_count", imatrix.n_chunks)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for key, value in imatrix.metadata.items():
            writer.add_string(key, value)
        for name in sorted(imatrix.entries):
            entry = imatrix.entries[name]
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums, np.float32))
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(entry.counts[:, None], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        if error.errno is None:  # numpy does not say why less was written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        writer.close()
