"""GGUF header from any seekable binary stream.

A GGUF file is a preamble, metadata (typed key-value pairs), a table of tensors, padding, then the tensors' data.
Everything before the data is read here, in large sequential pieces, so that the stream may be a file, bytes in memory
or HTTP ranges.

    header = read_header(Path("model-00001-of-00003.gguf"))     # all three shards
    header.metadata["general.architecture"]                     # 'qwen3moe'

Source: docs/gguf.md of ggml (the format), ggml/src/gguf.cpp of llama.cpp 0c1e57098 (what the engine accepts).
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

from moelocal.errors import BadGGUF, ModelNotFound, MoelocalError
from moelocal.model.ggml_types import GGML_TYPES, REMOVED_GGML_TYPES, GGMLType
from moelocal.model.gguf_values import FETCH_AGAIN, ArrayRef, Reader, ValueType, read_value

__all__ = [
    "GGML_TYPES",
    "ArrayRef",
    "GGMLType",
    "GGUFHeader",
    "TensorInfo",
    "ValueType",
    "merge_shards",
    "parse_header",
    "read_header",
]

MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one letter, type, one byte of value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of an empty name, n_dims, one dimension, type, offset
_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class TensorInfo(NamedTuple):
    """One row of the tensor table. `shape` is in GGUF order (fastest first: n_in, n_out, n_expert);
    `offset` is absolute in its shard; `shard` is the index into `GGUFHeader.shards`."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    n_bytes: int
    shard: int = 0


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF file says before its data begins; for split files, all shards merged (metadata and `data_offset` of
    the first). `shards` are the files' paths, `file_bytes` their sizes added up."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    shards: tuple[str, ...] = ()
    file_bytes: int = 0


def parse_header(stream: BinaryIO, n_bytes: int | None = None, name: str = "") -> GGUFHeader:
    """Reads the header of one GGUF file, from byte 0 of the stream on.

    Scalars become int, float, bool and str; arrays become lists, or an `ArrayRef` when they have more than
    `MAX_LIST_ELEMENTS` elements (or `MAX_LIST_BYTES` bytes). Keys, names and single strings must be UTF-8; strings in
    arrays may hold any bytes (tokens do), decoded with `surrogateescape`: `s.encode("utf-8", "surrogateescape")` gives
    the bytes back.

    Args:
        stream: seekable; a piece of the file that holds the whole header is enough when `n_bytes` is given.
        n_bytes: size of the file; None: found by seeking to its end.
        name: what messages, and `shards`, call the file.

    Raises:
        BadGGUF: not a GGUF file that llama.cpp would load, with the byte where reading gave up.
    """
    file_bytes = stream.seek(0, io.SEEK_END) if n_bytes is None else n_bytes
    reader = Reader(stream, file_bytes, name)
    n_tensors, n_keys = _read_preamble(reader)
    metadata = _read_metadata(reader, n_keys)
    alignment: int = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    table = _read_tensor_table(reader, n_tensors, alignment)
    data_offset = _round_up(reader.position, alignment) if table else reader.position
    tensors = tuple(row._replace(offset=data_offset + row.offset) for row in table)
    for tensor in tensors:
        if tensor.offset + tensor.n_bytes > file_bytes:
            raise reader.bad(
                f"the file ends before or inside the data of tensor {tensor.name!r}: it has {file_bytes:,} of"
                f" {tensors[-1].offset + tensors[-1].n_bytes:,} bytes",
                file_bytes,
                FETCH_AGAIN,
            )
    return GGUFHeader(metadata, tensors, data_offset, (name,) if name else (), file_bytes)


def _read_preamble(reader: Reader) -> tuple[int, int]:
    """Magic, version and counts; returns (n_tensors, n_keys)."""
    head = reader.peek(64)
    if not head.startswith(b"GGUF"):
        kind, hint = _looks_like(head)
        raise reader.bad(f"this is not a GGUF file{kind and ', but ' + kind}", 0, hint)
    reader.take(4)
    version = reader.u32()
    if version == 1:
        raise reader.bad("GGUF version 1 is no longer read by llama.cpp", 4, "Get a newer conversion of the model.")
    if version and version & 0xFFFF == 0:
        raise reader.bad(
            "this is a big-endian GGUF file, for IBM Z machines", 4, "Get the ordinary, little-endian file."
        )
    if version not in (2, 3):
        raise reader.bad(f"GGUF version {version} is unknown; versions 2 and 3 are read", 4)
    n_tensors, n_keys = reader.u64(), reader.u64()
    reader.item = f"table of {n_tensors:,} tensors and {n_keys:,} metadata keys"
    reader.require(n_tensors * _MIN_TENSOR_BYTES + n_keys * _MIN_KEY_BYTES)
    return n_tensors, n_keys


def _looks_like(head: bytes) -> tuple[str, str]:
    """What a file that is not GGUF seems to be, and what to do about it."""
    convert = "Convert it to GGUF first, or get the model's GGUF file."
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file", FETCH_AGAIN
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") <= 1 << 32:
        return "a safetensors checkpoint", convert
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, such as a PyTorch checkpoint", convert
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a Python pickle, such as an old PyTorch checkpoint", convert
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer to one", "Run `git lfs pull` where it was cloned, or download the file itself."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page", "The download was answered with a page: check the address, and log in if it needs that."
    if text.startswith((b"{", b"[")):
        return "a JSON text", "Name the .gguf file; if this was a download, the text says why it failed."
    if head[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return "a GGML file, the format before GGUF", "Get a newer conversion of the model."
    if head[:4] == b"FUGG":
        return "one with its bytes swapped", "Get the ordinary, little-endian file."
    if not head.strip(b"\0"):
        return "zeros, as in a download that never finished", FETCH_AGAIN
    return "", "Name the path of a .gguf file, or a model of: moelocal list"


def _read_metadata(reader: Reader, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(n_keys):
        start = reader.position
        reader.item = f"name of metadata key {i}"
        key = reader.text(MAX_KEY_BYTES)
        if not key:
            raise reader.bad(f"metadata key {i} has an empty name", start)
        if key in metadata:
            raise reader.bad(f"metadata key {key[:80]!r} appears twice", start)
        reader.item = f"value of metadata key {key[:80]!r}"
        value_type, value_at = reader.u32(), reader.position
        metadata[key] = value = read_value(reader, value_type)
        if key == "general.alignment" and (value_type != ValueType.UINT32 or value < 1 or value & (value - 1)):
            raise reader.bad(f"general.alignment is {value!r:.80}, not a power of two of type UINT32", value_at)
    return metadata


def _read_tensor_table(reader: Reader, n_tensors: int, alignment: int) -> list[TensorInfo]:
    """The rows of the table, offsets still relative to the data section.

    llama.cpp wants the tensors back to back in the order of the table, each padded to the alignment.
    """
    table: list[TensorInfo] = []
    names: set[str] = set()
    data_end = 0
    for i in range(n_tensors):
        start = reader.position
        reader.item = f"table row of tensor {i}"
        tensor = _read_tensor(reader)
        if tensor.name in names:
            raise reader.bad(f"tensor {tensor.name!r} appears twice", start)
        offset_at = reader.position - 8
        if tensor.offset % alignment:
            message = f"the offset {tensor.offset:,} of tensor {tensor.name!r} is no multiple of {alignment:,}"
            raise reader.bad(message, offset_at)
        if tensor.offset != data_end:
            fault = "overlaps the tensors before it" if tensor.offset < data_end else "leaves a gap before it"
            message = f"tensor {tensor.name!r} {fault}: its data is at {tensor.offset:,}, not at {data_end:,}"
            raise reader.bad(message, offset_at)
        data_end = _round_up(tensor.offset + tensor.n_bytes, alignment)
        names.add(tensor.name)
        table.append(tensor)
    return table


def _read_tensor(reader: Reader) -> TensorInfo:
    name = reader.text(MAX_TENSOR_NAME_BYTES)
    n_dims = reader.u32()
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        message = f"tensor {name!r} has {n_dims:,} dimensions; 1 to {MAX_DIMENSIONS} are possible"
        raise reader.bad(message, reader.position - 4)
    shape_at = reader.position
    shape: tuple[int, ...] = struct.unpack(f"<{n_dims}Q", reader.take(8 * n_dims))
    ggml_type = reader.u32()
    if ggml_type not in GGML_TYPES:
        removed = REMOVED_GGML_TYPES.get(ggml_type)
        fault = f"type {removed}, removed from llama.cpp" if removed else f"the unknown type {ggml_type}"
        hint = "Get a newer conversion of the model." if removed else "The file is damaged, or newer than this program."
        raise reader.bad(f"tensor {name!r} has {fault}", reader.position - 4, hint)
    type_name, block_size, type_bytes = GGML_TYPES[ggml_type]
    n_elements = 1
    for extent in shape:
        n_elements *= extent
    n_bytes = n_elements // block_size * type_bytes
    shown = " x ".join(f"{extent:,}" for extent in shape)
    if not 0 < n_elements < 1 << 63 or n_bytes >= 1 << 63:
        raise reader.bad(f"tensor {name!r} has the impossible shape {shown}", shape_at)
    if shape[0] % block_size:
        message = f"tensor {name!r} ({shown}) has rows that are no multiple of {type_name}'s block of {block_size}"
        raise reader.bad(message, shape_at)
    return TensorInfo(name, shape, ggml_type, reader.u64(), n_bytes)


def _round_up(value: int, alignment: int) -> int:
    return (value + alignment - 1) & -alignment


def read_header(path: Path) -> GGUFHeader:
    """Reads the header of a GGUF file or, when it is one shard of a split model, of all shards together.

    Any shard may be named: reading starts at the first, which is `shards[0]`, the one to give to llama.cpp.

    Raises:
        ModelNotFound: no such file, or shards are missing: all of them are named.
        BadGGUF: a file is not usable GGUF, or the shards do not belong together.
        MoelocalError: the file cannot be read.
    """
    header = _read_file(path)
    prefix, count = split_of(path.name, header)
    if count == 1:
        return header
    paths = [path.with_name(f"{prefix}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing:
        message = f"{len(missing)} of {count} shards of {prefix} are missing: {', '.join(missing)}."
        raise ModelNotFound(message, f"Download them into {path.parent}, beside {path.name}.")
    return merge_shards([header if shard == path else _read_file(shard) for shard in paths])


def split_of(name: str, header: GGUFHeader) -> tuple[str, int]:
    """What all shards' names begin with, and how many shards there are: 1 for a model that is not split.

    Raises:
        BadGGUF: a file's name and its header do not agree.
    """
    match = _SHARD_NAME.fullmatch(name)
    prefix, number, named = (match["prefix"], int(match["number"]), int(match["count"])) if match else ("", 1, 1)
    count = header.metadata.get("split.count")
    if named <= 1 and count in (None, 0, 1):
        return prefix, 1
    if type(count) is not int or count != named or not 1 <= number <= count:
        message = f"{name}: by its name this is shard {number} of {named}, but its split.count is {count!r:.80}"
        raise BadGGUF(message, header.data_offset, "Shards must be called like NAME-00001-of-00003.gguf.")
    return prefix, count


def _read_file(path: Path) -> GGUFHeader:
    try:
        if path.exists() and not path.is_file():
            raise MoelocalError(f"{path} is not a file.", "Name the .gguf file itself.")
        with path.open("rb") as stream:
            return replace(parse_header(stream, name=path.name), shards=(str(path),))
    except FileNotFoundError as error:
        raise ModelNotFound(f"There is no file {path}.") from error
    except OSError as error:
        raise MoelocalError(f"{path} cannot be read: {error.strerror or error}.") from error


def merge_shards(headers: Sequence[GGUFHeader]) -> GGUFHeader:
    """One header of all shards of a split model, parsed each with its name, in order.

    Raises:
        BadGGUF: they do not belong together.
    """
    names = [PurePath(*header.shards).name for header in headers]
    tensors: dict[str, TensorInfo] = {}
    for i, (header, name) in enumerate(zip(headers, names, strict=True)):
        for key, expected in (("split.no", i), ("split.count", len(headers))):
            if header.metadata.get(key) != expected:
                found = f"{header.metadata[key]!r:.80}" if key in header.metadata else "absent"
                raise BadGGUF(f"{name}: {key} is {found}, not {expected}", header.data_offset)
        for tensor in header.tensors:
            if tensor.name in tensors:
                message = f"{name}: tensor {tensor.name!r} is also in {names[tensors[tensor.name].shard]}"
                raise BadGGUF(message, tensor.offset, "Two different models may be mixed up here.")
            tensors[tensor.name] = tensor._replace(shard=i)
    first = headers[0]
    n_tensors = first.metadata.get("split.tensors.count")
    if n_tensors != len(tensors):
        message = f"{names[0]}: split.tensors.count is {n_tensors!r:.80}, the shards hold {len(tensors):,} tensors"
        raise BadGGUF(message, first.data_offset, "The shards may come from different versions of the model.")
    return replace(
        first,
        tensors=tuple(tensors.values()),
        shards=tuple(shard for header in headers for shard in header.shards),
        file_bytes=sum(header.file_bytes for header in headers),
    )
