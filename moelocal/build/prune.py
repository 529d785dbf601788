"""A MoE model with fewer experts: byte slices of every tensor that has one row, matrix or number for each expert.

    experts = look(header)                               # what may be dropped; refuses what cannot be pruned
    cut = Cut(header, experts, kept, record)             # layer -> ids that stay
    write(cut, out, progress)

Nothing is quantized again: experts are the outermost dimension of these tensors. Shared experts, dense layers and the
rest of the file are copied as they are.

Source: llama.cpp 0c1e57098, src/llama-model.cpp (`expert_count` is one number for all layers; the scales of experts),
src/llama-graph.cpp `build_moe_ffn` (groups are equally many neighbours, judged by their best two).
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from moelocal.build.gguf_file import RawKey, copy_bytes, head_of, integers, padding, read_keys, texts
from moelocal.build.output import writing
from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.facts import read_facts
from moelocal.model.header import DEFAULT_ALIGNMENT, GGUFHeader, TensorInfo
from moelocal.model.roles import is_split_expert, tensor_role

_PREFIX = "moelocal.prune."
_SPLIT = ("split.no", "split.count", "split.tensors.count")
_BEST_OF_GROUP = 2  # experts by which a group is judged
_TABLE = re.compile(r"blk\.\d+\.ffn_gate_tid2eid\b")


class Experts(NamedTuple):
    """A model's experts: `n_experts` in each of `layers`, `n_used` per token, `n_groups` groups of neighbours that are
    chosen first (1: none). At least `least` must stay, as many in each group."""

    n_experts: int
    n_used: int
    n_groups: int
    least: int
    layers: tuple[int, ...]

    def counts(self) -> range:
        """The numbers of experts that can stay."""
        return range(self.least, self.n_experts, self.n_groups)


class Record(NamedTuple):
    """How it was decided what stays, for the file's metadata."""

    criterion: str
    source: str
    text_sha256: str
    n_tokens: int


def look(header: GGUFHeader) -> Experts:
    """What can be dropped.

    Raises:
        BadRequest: the model has no experts, or in a form that cannot be cut.
    """
    facts = read_facts(header)
    arch = facts.arch
    if not facts.is_moe:
        raise BadRequest(
            f"{facts.name or 'This'} is a dense model: it has no experts to drop.",
            "Give a MoE model: moelocal list shows which are.",
        )
    for tensor in header.tensors:
        if is_split_expert(tensor.name):
            raise BadRequest(
                f"This file of {arch} has a tensor for each expert ({tensor.name}), as files of 2023 do.",
                "Get a newer conversion of the model.",
            )
        if "_chexps" in tensor.name or _TABLE.match(tensor.name):
            raise BadRequest(
                f"Models of {arch} cannot be pruned: {tensor.name} ties experts together by their numbers.",
                "moelocal quantize makes it smaller instead.",
            )
    n_experts, n_used = facts.n_experts, facts.n_experts_used
    for tensor in filter(is_cut, header.tensors):
        if tensor.shape[-1] != n_experts:
            raise BadRequest(
                f"{tensor.name} has {tensor.shape[-1]:,} experts, other layers have {n_experts:,}.",
                "Only models with as many experts in each layer can be pruned.",
            )
    n_groups = _integer(header, "expert_group_count", 1)
    least = max(2, n_used)
    if n_groups > 1:
        n_groups_used = max(1, _integer(header, "expert_group_used_count", 1))
        least = n_groups * max(_BEST_OF_GROUP, math.ceil(n_used / n_groups_used))
    layers = sorted({index for tensor in header.tensors if is_cut(tensor) and (index := _layer(tensor)) is not None})
    return Experts(n_experts, n_used, max(1, n_groups), least, tuple(layers))


def is_cut(tensor: TensorInfo) -> bool:
    """Whether the outermost dimension counts routed experts. The scale of Gemma 4's routers counts their inputs."""
    role = tensor_role(tensor.name)[1]
    return role == "routed_expert" or (role == "router" and not tensor.name.endswith("ffn_gate_inp.scale"))


def smaller(header: GGUFHeader, n_experts: int, n_keep: int) -> GGUFHeader:
    """The header of the model with `n_keep` experts, for planning: sizes are right, offsets are not."""
    tensors = tuple(
        tensor._replace(shape=(*tensor.shape[:-1], n_keep), n_bytes=tensor.n_bytes // n_experts * n_keep)
        if is_cut(tensor)
        else tensor
        for tensor in header.tensors
    )
    key = f"{header.metadata['general.architecture']}.expert_count"
    saved = sum(old.n_bytes - new.n_bytes for old, new in zip(header.tensors, tensors, strict=True))
    metadata = {**header.metadata, key: n_keep}
    return replace(header, tensors=tensors, metadata=metadata, file_bytes=header.file_bytes - saved)


@dataclass(frozen=True)
class Cut:
    """A model and what stays of it: `kept` are ids of each layer with experts, as many everywhere."""

    header: GGUFHeader
    experts: Experts
    kept: Mapping[int, Sequence[int]]
    record: Record

    @property
    def n_keep(self) -> int:
        """Experts that stay in a layer."""
        return len(next(iter(self.kept.values())))

    @property
    def paths(self) -> list[Path]:
        """The model's files."""
        return [Path(shard) for shard in self.header.shards]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Those of the result; their offsets are not right."""
        return smaller(self.header, self.experts.n_experts, self.n_keep).tensors

    @property
    def alignment(self) -> int:
        """Of the tensors' data."""
        return int(self.header.metadata.get("general.alignment", DEFAULT_ALIGNMENT))

    @cached_property
    def head(self) -> tuple[bytes, list[int]]:
        """See `head_of`."""
        return head_of(self._keys(), self.tensors, self.alignment)

    @cached_property
    def file_bytes(self) -> int:
        """Size of the result."""
        last = self.tensors[-1].n_bytes
        return self.head[1][-1] + last + padding(last, self.alignment)

    def _keys(self) -> list[RawKey]:
        """The metadata: the model's own, the number of experts changed, what was done added."""
        count = f"{self.header.metadata['general.architecture']}.expert_count"
        keys = [key for key in read_keys(self.paths[0]) if not key.name.startswith(_PREFIX) and key.name not in _SPLIT]
        keys = [key.with_integer(self.n_keep) if key.name == count else key for key in keys]
        before = self._before()
        record = self.record
        layers = sorted(self.kept)
        return [
            *keys,
            texts(f"{_PREFIX}criterion", [*before["criterion"], record.criterion]),
            texts(f"{_PREFIX}source", [*before["source"], record.source]),
            texts(f"{_PREFIX}text_sha256", [*before["text_sha256"], record.text_sha256]),
            integers(f"{_PREFIX}n_tokens", [*before["n_tokens"], record.n_tokens]),
            integers(f"{_PREFIX}experts_before", [*before["experts_before"], self.experts.n_experts]),
            integers(f"{_PREFIX}layers", layers),
            integers(f"{_PREFIX}kept", [expert for layer in layers for expert in self._first_ids(layer)]),
        ]

    def _before(self) -> dict[str, list[Any]]:
        """What the metadata says about earlier prunings, oldest first."""
        names = ("criterion", "source", "text_sha256", "n_tokens", "experts_before")
        held = {name: self.header.metadata.get(_PREFIX + name) for name in names}
        if all(isinstance(values, list) for values in held.values()):
            return {name: values for name, values in held.items() if values is not None}
        return {name: [] for name in names}

    def _first_ids(self, layer: int) -> list[int]:
        """Ids of a layer's kept experts as the model had them before any pruning."""
        first = original_ids(self.header, self.paths[0], layer, self.experts)
        return [first[expert] for expert in self.kept[layer]]


def original_ids(header: GGUFHeader, path: Path, layer: int, experts: Experts) -> Sequence[int]:
    """The ids that a layer's experts had before any pruning, by those that they have now."""
    layers, kept = (_listed(header.metadata.get(_PREFIX + name), path) for name in ("layers", "kept"))
    if layer in layers and len(kept) == len(layers) * experts.n_experts:
        at = layers.index(layer) * experts.n_experts
        return kept[at : at + experts.n_experts]
    return range(experts.n_experts)


def _listed(value: Any, path: Path) -> list[int]:
    """An array of the metadata, read from the file if it is long."""
    from moelocal.model.gguf_values import ArrayRef

    if isinstance(value, ArrayRef):
        with path.open("rb") as file:
            return value.read(file)
    return value if isinstance(value, list) else []


def largest(fits: Callable[[int], bool], experts: Experts) -> int | None:
    """The largest number of experts that fits, all of them included; None if even the fewest do not. `fits`: asked
    about numbers; with fewer experts a model is smaller."""
    counts = [*experts.counts(), experts.n_experts]
    n_fitting = bisect.bisect_left(counts, True, key=lambda n: not fits(n))
    return counts[n_fitting - 1] if n_fitting else None


def write(cut: Cut, output: Path, progress: Callable[[float], None], replace_it: bool = False) -> None:
    """Writes the pruned model, whole or not at all, in pieces of some MiB.

    Raises:
        BadRequest: the output is there already, or is the model itself.
        MoelocalError: no room, or a file cannot be read.
    """
    if any(output.exists() and output.samefile(path) for path in cut.paths):
        raise BadRequest(f"{output} is the model itself.", "Name another file.")
    head, offsets = cut.head
    with writing(output, cut.file_bytes, replace_it) as part, ExitStack() as stack:
        sources = [stack.enter_context(path.open("rb")) for path in cut.paths]
        out = stack.enter_context(part.open("wb"))
        out.write(head)
        for tensor, offset in zip(cut.header.tensors, offsets, strict=True):
            out.write(bytes(offset - out.tell()))
            try:
                for start, n_bytes in _ranges(tensor, cut):
                    copy_bytes(sources[tensor.shard], out, start, n_bytes)
            except EOFError as error:
                raise MoelocalError(
                    f"{cut.paths[tensor.shard]} became shorter while it was read.", "Check the file, then try again."
                ) from error
            progress(out.tell() / cut.file_bytes)
        out.write(bytes(cut.file_bytes - out.tell()))


def _ranges(tensor: TensorInfo, cut: Cut) -> list[tuple[int, int]]:
    """The byte ranges of a tensor that stay, as (start, length): neighbours together."""
    if not is_cut(tensor):
        return [(tensor.offset, tensor.n_bytes)]
    layer = _layer(tensor)
    assert layer is not None
    size = tensor.n_bytes // cut.experts.n_experts
    ranges: list[tuple[int, int]] = []
    for expert in cut.kept[layer]:
        start = tensor.offset + expert * size
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + size
        else:
            ranges.append((start, size))
    return ranges


def _layer(tensor: TensorInfo) -> int | None:
    return tensor_role(tensor.name)[0]


def _integer(header: GGUFHeader, key: str, default: int) -> int:
    value = header.metadata.get(f"{header.metadata['general.architecture']}.{key}")
    return value if isinstance(value, int) and not isinstance(value, bool) else default
