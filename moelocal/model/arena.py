"""How ggml lays tensors of a graph out in a device's buffer: best fit among the holes, else at the end. Pure.

Source: llama.cpp 0c1e57098, ggml/src/ggml-alloc.c (ggml_dyn_tallocr_alloc, ggml_dyn_tallocr_free_bytes).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

F32, F16 = 4, 2  # bytes
_ALIGNMENT = 32  # of a CPU buffer; other devices pad to 128 or 256, which changes nothing that matters here


class Block(NamedTuple):
    """Bytes of a buffer that a tensor occupies."""

    offset: int
    n_bytes: int


@dataclass(slots=True)
class Arena:
    """One device's buffer while its graph is laid out; `peak_bytes` is the size that it needs."""

    peak_bytes: int = 0
    _holes: list[tuple[int, int]] = field(default_factory=list)  # (offset, bytes), by offset; none touches another
    _end: int = 0  # of the last tensor: from here on everything is free

    def take(self, n_bytes: int) -> Block:
        """Place for a new tensor."""
        n_bytes = -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        fitting = [(size, -offset) for offset, size in self._holes if size >= n_bytes]
        if not fitting:
            block = Block(self._end, n_bytes)
            self._end += n_bytes
            self.peak_bytes = max(self.peak_bytes, self._end)
            return block
        size, negative = min(fitting)  # of equally good holes the last
        self._holes.remove((-negative, size))
        if size > n_bytes:
            insort(self._holes, (-negative + n_bytes, size - n_bytes))
        return Block(-negative, n_bytes)

    @property
    def state(self) -> tuple[object, ...]:
        """What the places of further tensors depend on."""
        return self._end, *self._holes

    def free(self, block: Block) -> None:
        """Gives a tensor's place back; it becomes one with the holes beside it."""
        start, end = block.offset, block.offset + block.n_bytes
        for hole in [hole for hole in self._holes if hole[0] + hole[1] == start or hole[0] == end]:
            self._holes.remove(hole)
            start, end = min(start, hole[0]), max(end, hole[0] + hole[1])
        if end == self._end:
            self._end = start
        elif end > start:
            insort(self._holes, (start, end - start))


class Tensor(NamedTuple):
    """A tensor's place."""

    device: str
    block: Block


class Replay:
    """Takes and frees tensors on their devices; `n_tokens` pass through the graph at once."""

    def __init__(self, n_tokens: int) -> None:
        self.arenas: dict[str, Arena] = {}
        self.n_tokens = n_tokens

    def new(self, device: str, width: int, extra: int = 0) -> Tensor:
        """float32[n_tokens, width], and `extra` values more."""
        return self.take(device, (width * self.n_tokens + extra) * F32)

    @property
    def state(self) -> tuple[object, ...]:
        """What the places of further tensors depend on."""
        return tuple((name, *arena.state) for name, arena in self.arenas.items())

    def take(self, device: str, n_bytes: int) -> Tensor:
        """A tensor of so many bytes."""
        arena = self.arenas.setdefault(device, Arena())
        return Tensor(device, arena.take(n_bytes))

    def like(self, tensor: Tensor) -> Tensor:
        """Another tensor of the same size, on the same device."""
        return self.take(tensor.device, tensor.block.n_bytes)

    def free(self, *tensors: Tensor) -> None:
        """Their places may be taken again."""
        for tensor in tensors:
            self.arenas[tensor.device].free(tensor.block)

    def copy(self, tensor: Tensor, device: str) -> Tensor:
        """The tensor on another device; there, it has a place of its own."""
        return tensor if tensor.device == device else self.take(device, tensor.block.n_bytes)

    def replace(self, tensor: Tensor) -> Tensor:
        """Another tensor of the same size instead of this one."""
        new = self.like(tensor)
        self.free(tensor)
        return new

    def move(self, tensor: Tensor, device: str) -> Tensor:
        """The tensor on the device that goes on with it, and no longer elsewhere."""
        moved = self.copy(tensor, device)
        if moved is not tensor:
            self.free(tensor)
        return moved
