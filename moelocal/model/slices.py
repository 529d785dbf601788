"""Where each expert's weights lie in the files of a checkpoint, and where what every token uses.

Experts are the outermost dimension of their tensors, so one expert of one tensor is one range of bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from moelocal.model.header import GGUFHeader, TensorInfo
from moelocal.model.roles import tensor_role

_READ_LAST = "down"  # up and gate are multiplied first


class Range(NamedTuple):
    """Bytes of one of the checkpoint's files; `shard` is the index into `GGUFHeader.shards`."""

    shard: int
    offset: int
    n_bytes: int


class Stack(NamedTuple):
    """One tensor of routed experts."""

    tensor: TensorInfo

    @property
    def n_experts(self) -> int:
        """Experts in it."""
        return self.tensor.shape[-1]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.tensor.n_bytes // self.n_experts

    def expert(self, index: int) -> Range:
        """Where an expert lies."""
        return Range(self.tensor.shard, self.tensor.offset + index * self.expert_bytes, self.expert_bytes)


def expert_stacks(header: GGUFHeader) -> dict[int, tuple[Stack, ...]]:
    """By layer the tensors of its routed experts, in the order in which llama.cpp multiplies them; biases left out."""
    layers: dict[int, list[Stack]] = {}
    for tensor in header.tensors:
        layer, role = tensor_role(tensor.name)
        if layer is not None and role == "routed_expert" and len(tensor.shape) == 3:
            layers.setdefault(layer, []).append(Stack(tensor))
    return {
        layer: tuple(sorted(stacks, key=lambda stack: _READ_LAST in stack.tensor.name))
        for layer, stacks in sorted(layers.items())
    }


def always_used(header: GGUFHeader) -> dict[int | None, tuple[Range, ...]]:
    """What every token uses, by layer; outside the layers under None. Of an embedding table a token reads one row, so
    it is there only if it serves as the output too."""
    found: dict[int | None, list[Range]] = {}
    has_output = any(tensor.name == "output.weight" for tensor in header.tensors)
    for tensor in header.tensors:
        layer, role = tensor_role(tensor.name)
        if role == "routed_expert" and len(tensor.shape) == 3:
            continue
        if role == "embedding" and (has_output or tensor.name != "token_embd.weight"):
            continue
        found.setdefault(layer, []).append(Range(tensor.shard, tensor.offset, tensor.n_bytes))
    return {layer: tuple(ranges) for layer, ranges in found.items()}
