"""A GGUF file written from parts of another one: metadata byte for byte, keys replaced and added, tensors in order.

Source: docs/gguf.md of ggml; ggml/src/gguf.cpp of llama.cpp 0c1e57098 (arrays of arrays are not read).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moelocal.model.gguf_values import Reader, ValueType, read_value
from moelocal.model.header import MAX_KEY_BYTES, TensorInfo

_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
}


class RawKey(NamedTuple):
    """A metadata key with its type and the bytes of its value, as stored."""

    name: str
    value_type: int
    value: bytes

    def with_integer(self, value: int) -> RawKey:
        """The same key of the same type with another number."""
        return self._replace(value=struct.pack(f"<{_CODES[ValueType(self.value_type)]}", value))


def integers(name: str, values: Sequence[int]) -> RawKey:
    """A key that holds an array of uint32."""
    head = struct.pack("<IQ", ValueType.UINT32, len(values))
    return RawKey(name, ValueType.ARRAY, head + struct.pack(f"<{len(values)}I", *values))


def texts(name: str, values: Sequence[str]) -> RawKey:
    """A key that holds an array of strings."""
    head = struct.pack("<IQ", ValueType.STRING, len(values))
    return RawKey(name, ValueType.ARRAY, head + b"".join(_text(value) for value in values))


def read_keys(path: Path) -> list[RawKey]:
    """The metadata of a file that `read_header` accepts."""
    keys: list[RawKey] = []
    with path.open("rb") as file:
        reader = Reader(file, path.stat().st_size, path.name)
        reader.take(16)  # magic, version, number of tensors: the header was read before
        for _ in range(reader.u64()):
            name, value_type, start = reader.text(MAX_KEY_BYTES), reader.u32(), reader.position
            read_value(reader, value_type)
            end = reader.position
            file.seek(start)
            keys.append(RawKey(name, value_type, file.read(end - start)))
            reader.seek(end)
    return keys


def head_of(keys: Sequence[RawKey], tensors: Sequence[TensorInfo], alignment: int) -> tuple[bytes, list[int]]:
    """Everything before the data, padded, and where each tensor's data begins in the file.

    `tensors`: their names, shapes, types and sizes count, their offsets do not.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    parts += [_text(key.name) + struct.pack("<I", key.value_type) + key.value for key in keys]
    offsets, end = [], 0
    for tensor in tensors:
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        parts.append(_text(tensor.name) + dimensions + struct.pack("<IQ", tensor.ggml_type, end))
        offsets.append(end)
        end += tensor.n_bytes + padding(tensor.n_bytes, alignment)
    head = b"".join(parts)
    head += bytes(padding(len(head), alignment))
    return head, [len(head) + offset for offset in offsets]


def padding(n_bytes: int, alignment: int) -> int:
    """Bytes to the next multiple of the alignment."""
    return -n_bytes % alignment


def copy_bytes(source: BinaryIO, out: BinaryIO, start: int, n_bytes: int, piece_bytes: int = 8 << 20) -> None:
    """Copies a range, a piece at a time.

    Raises:
        EOFError: the source ends before.
    """
    source.seek(start)
    while n_bytes:
        piece = source.read(min(n_bytes, piece_bytes))
        if not piece:
            raise EOFError
        out.write(piece)
        n_bytes -= len(piece)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
