"""llama.cpp's mapping of a model file: made without reading the file, found, and taken apart into byte ranges.

llama.cpp maps with MAP_POPULATE and has no switch for it: of a file larger than RAM all is read at the load, and most
of that thrown out again. `lazily` hands llama.cpp an `mmap` without that flag for as long as the model loads: the
address of `mmap` in the library's own table of imported functions (its GOT) is exchanged, and put back.
Whatever is not as expected leaves everything as it was: the load then reads the file, as llama.cpp does by itself.

Source: llama.cpp 0c1e57098, src/llama-mmap.cpp; ELF-64 object file format (Elf64_Dyn, Elf64_Rela, Elf64_Sym).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from moelocal.engine.libc import PAGE_BYTES, libc

_MAP_POPULATE = 0x8000
_PROT = {"r": 1, "w": 2, "x": 4}
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 2, 5, 6, 7, 8, 23
_RELOCATIONS = {"x86_64": {6, 7}, "aarch64": {1025, 1026}}  # GLOB_DAT and JUMP_SLOT
_MMAP_NAMES = (b"mmap", b"mmap64")


class Mapping(NamedTuple):
    """A piece of a file in memory: `address` holds the file's byte `offset`."""

    address: int
    n_bytes: int
    offset: int


class _Region(NamedTuple):
    start: int
    end: int
    rights: str
    offset: int
    inode: int
    path: str


def _regions() -> list[_Region]:
    """This process's memory map.

    Source: proc_pid_maps(5).
    """
    found = []
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        span, rights, offset, _, inode, path = f"{line} -".split(maxsplit=5)
        start, end = (int(address, 16) for address in span.split("-"))
        found.append(_Region(start, end, rights, int(offset, 16), int(inode), path.removesuffix("-").strip()))
    return found


def mappings(path: Path) -> list[Mapping]:
    """Where this process has mapped the file for reading; none where the system does not say."""
    if sys.platform != "linux":
        return []
    real = os.path.realpath(path)
    inode = os.stat(real).st_ino
    return [
        Mapping(region.start, region.end - region.start, region.offset)
        for region in _regions()
        if region.inode == inode and region.path == real and region.rights.startswith("r--")
    ]


def within(pieces: Sequence[Mapping], offset: int, n_bytes: int) -> int | None:
    """The address of a byte range of the file, if one mapping holds all of it."""
    for piece in pieces:
        if piece.offset <= offset and offset + n_bytes <= piece.offset + piece.n_bytes:
            return piece.address + offset - piece.offset
    return None


@contextmanager
def lazily(library: str, wanted: bool = True) -> Iterator[bool]:
    """Within it, what `library` (a path) maps is not read at once. Gives whether that could be arranged."""
    slots: list[int] = []
    if wanted and sys.platform == "linux" and platform.machine() in _RELOCATIONS and sys.maxsize > 1 << 32:
        try:
            slots = _slots(os.path.realpath(library))
        except (OSError, ValueError, struct.error):
            slots = []
    if not slots:
        yield False
        return
    real = libc().mmap

    def unread(address: int, n_bytes: int, rights: int, flags: int, file: int, offset: int) -> int | None:
        try:
            found: int | None = real(address, n_bytes, rights, flags & ~_MAP_POPULATE, file, offset)
        except BaseException:  # a signal's: C would take "no answer" for the address 0
            found = real(address, n_bytes, rights, flags & ~_MAP_POPULATE, file, offset)
        return found

    replacement = ctypes.CFUNCTYPE(real.restype, *real.argtypes)(unread)
    address = ctypes.cast(replacement, ctypes.c_void_p).value
    assert address is not None  # a function that was just made
    originals = [_exchange(slot, address) for slot in slots]
    try:
        yield all(original is not None for original in originals)
    finally:
        for slot, original in zip(slots, originals, strict=True):
            if original is not None:
                _exchange(slot, original)


def _slots(library: str) -> list[int]:
    """Addresses of the words that hold `mmap`'s address for a loaded library.

    Raises:
        ValueError, struct.error: the library is not loaded, or is no ELF-64 file.
    """
    pieces = [region for region in _regions() if region.path == library]
    head = next((region.start for region in pieces if region.offset == 0), None)
    if head is None or ctypes.string_at(head, 6) != b"\x7fELF\x02\x01":
        raise ValueError("not loaded, or not ELF-64")
    table_at, entry_bytes, n_entries = struct.unpack("<Q14xHH", ctypes.string_at(head + 32, 26))
    headers = [
        struct.unpack("<II6Q", ctypes.string_at(head + table_at + i * entry_bytes, 56)) for i in range(n_entries)
    ]
    base = head - min(virtual for kind, _, _, virtual, *_ in headers if kind == _PT_LOAD)
    at, n_bytes = next((base + h[3], h[6]) for h in headers if h[0] == _PT_DYNAMIC)
    entries = dict(struct.iter_unpack("<qQ", ctypes.string_at(at, n_bytes)))

    def pointer(tag: int) -> int:  # glibc has added the base already, musl has not
        return int(entries[tag]) if entries[tag] >= base else base + int(entries[tag])

    kinds, found = _RELOCATIONS[platform.machine()], []
    for table, size in ((_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ)):
        if table not in entries:
            continue
        for where, info, _ in struct.iter_unpack("<QQq", ctypes.string_at(pointer(table), entries[size])):
            if info & 0xFFFFFFFF in kinds:
                name_at = struct.unpack("<I", ctypes.string_at(pointer(_DT_SYMTAB) + 24 * (info >> 32), 4))[0]
                if ctypes.string_at(pointer(_DT_STRTAB) + name_at) in _MMAP_NAMES:
                    found.append(base + where)
    return found


def _exchange(slot: int, address: int) -> int | None:
    """Writes an address into a table that may be read-only. Returns what was there; None: it could not be written."""
    region = next((region for region in _regions() if region.start <= slot < region.end), None)
    if region is None:
        return None
    page = slot & -PAGE_BYTES
    rights = sum(bit for letter, bit in _PROT.items() if letter in region.rights)
    if libc().mprotect(page, PAGE_BYTES, rights | _PROT["w"]):
        return None
    word = ctypes.c_uint64.from_address(slot)
    before, word.value = word.value, address
    libc().mprotect(page, PAGE_BYTES, rights)
    return before
