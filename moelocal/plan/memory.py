"""What a setting takes in each device's memory: weights, KV cache, compute buffers. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moelocal.machine.hardware import Machine
from moelocal.model.compute import Where, Work, compute_bytes
from moelocal.model.facts import LayerFacts, ModelFacts
from moelocal.model.kv import KVType, row_bytes

if TYPE_CHECKING:
    from moelocal.plan.cost import Placement

CPU = "CPU"
PROGRAM_BYTES = 256 << 20  # this program with llama.cpp's own libraries
_SCRATCH_BYTES = 48 << 20
_THUMB = 12  # activations alive at once, in rows of the model's width


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes on one device, by what they hold, and how many it may hold. Weights that stay on the disk do not count."""

    name: str
    kind: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


class Sizes(NamedTuple):
    """Bytes that a context, its KV type and the ubatch bring: `kv` of each layer, `extra_kv` of caches without a layer,
    `compute` at most on a GPU that computes layers and `ram_compute` in RAM, `stage` more on a GPU that long prompts
    copy experts to: one tensor at a time. `kinds`: the first layer of each layer's kind."""

    kv: tuple[int, ...]
    extra_kv: int
    compute: int
    ram_compute: int
    stage: int
    kinds: tuple[int, ...]

    @classmethod
    def of(cls, facts: ModelFacts, n_ctx: int, kv_type: KVType, n_ubatch: int, n_outputs: int = 1) -> Sizes:
        """The sizes of one setting; `n_outputs` tokens of a batch have their logits kept.

        Raises:
            BadRequest: this model's cache cannot have that type.
        """
        n_ubatch = min(n_ubatch, n_ctx)
        kinds = facts.kinds
        of_kind = {kind: facts.layers[kind].kv_bytes(n_ctx, kv_type, n_ubatch) for kind in set(kinds)}
        kv = tuple(of_kind[kind] for kind in kinds)
        extra = sum(cache.n_bytes(n_ctx, kv_type, n_ubatch) for cache in facts.extra_caches)
        stage = max((t.n_bytes for layer in facts.layers for t in layer.expert_tensors), default=0)
        n, gpu = len(facts.layers), "GPU"
        work = Work(n_ctx, kv_type, n_ubatch, n_outputs)
        places = [Where.all_on(CPU, n), Where.all_on(gpu, n)]
        if facts.is_moe:
            places.append(Where((gpu,) * n, (CPU,) * n, gpu))
        found = [graph_bytes(facts, work, where) for where in places]
        compute = max(one.get(gpu, 0) for one in found)
        return cls(kv, extra, compute, max(one[CPU] for one in found), stage, kinds)


def graph_bytes(facts: ModelFacts, work: Work, where: Where) -> dict[str, int]:
    """Compute buffers by device name, as `compute.compute_bytes` has them; a rule of thumb without a known graph."""
    if facts.graph.layers:
        return compute_bytes(facts, work, where)
    activations = work.n_ubatch * facts.n_vocab // 16 * 4 * _THUMB
    return dict.fromkeys(
        (CPU, *where.layers, where.output), _SCRATCH_BYTES + activations + 2 * work.n_ubatch * work.n_ctx
    )


def tally(placement: Placement, kinds: tuple[int, ...]) -> Counter[tuple[int, str, str]]:
    """How many layers of a kind have one home and their experts on one device: a few entries, however many layers."""
    return Counter(zip(kinds, placement.layers, placement.experts, strict=True))


def placed(facts: ModelFacts, machine: Machine, placement: Placement, sizes: Sizes) -> dict[str, MemoryUse]:
    """Memory by device name, the CPU's first; all weights are counted, also those that RAM cannot hold."""
    weights, kv = {CPU: facts.embedding_bytes - _tied(facts, placement)}, {CPU: 0}
    staging: set[str] = set()
    for (kind, home, where), n in tally(placement, sizes.kinds).items():
        layer = facts.layers[kind]
        weights[home] = weights.get(home, 0) + n * layer.always_active_bytes
        kv[home] = kv.get(home, 0) + n * sizes.kv[kind]
        weights[where] = weights.get(where, 0) + n * layer.routed_expert_bytes
        if where == CPU != home and layer.routed_expert_bytes:
            staging.add(home)
    for index, moved in placement.moved().items():
        where = placement.experts[index]
        for tensor in facts.layers[index].expert_tensors:
            target = moved.get(tensor.name, where)
            weights[where] -= tensor.n_bytes
            weights[target] = weights.get(target, 0) + tensor.n_bytes
    out = placement.output
    weights[out] = weights.get(out, 0) + facts.output_bytes + facts.other_bytes
    kv[out] = kv.get(out, 0) + sizes.extra_kv
    uses = {}
    for device in machine.devices:
        name = device.name
        if name not in weights and name != CPU:
            continue
        compute = sizes.ram_compute if device.kind == "cpu" else sizes.compute
        compute += sizes.stage if name in staging and device.kind == "gpu" else 0
        budget = machine.ram_free_bytes if device.kind == "cpu" else device.free_bytes
        uses[name] = MemoryUse(name, device.kind, weights.get(name, 0), kv.get(name, 0), compute, budget)
    return uses


def _tied(facts: ModelFacts, placement: Placement) -> int:
    """Bytes of the embedding that serve as the output too: on one device they are there once."""
    return facts.tied_output_bytes if placement.output == CPU else 0


def ram_left(machine: Machine, uses: dict[str, MemoryUse]) -> int:
    """RAM for the CPU's weights, after everything else that lives in it; may be negative."""
    shared = {device.name for device in machine.devices if device.shares_ram}
    cpu = uses[CPU]
    others = sum(use.total_bytes for name, use in uses.items() if name in shared and name != CPU)
    return machine.ram_free_bytes - PROGRAM_BYTES - cpu.kv_bytes - cpu.compute_bytes - others


def cache_bytes(layer: LayerFacts, n_depth: int, kv_type: KVType) -> float:
    """Bytes of cache and state that a token reads in a layer when `n_depth` tokens are there."""
    held = float(layer.state_bytes)
    for cache in layer.caches:
        cells = min(n_depth / cache.ratio, cache.window or n_depth)
        held += cells * (row_bytes(cache.k_elements, kv_type) + row_bytes(cache.v_elements, kv_type))
    return held
