"""How fast a setting could be at most: what one token must read, at the speed that each device reads with. Pure."""

from __future__ import annotations

from moelocal.machine.hardware import Machine
from moelocal.model.facts import LayerFacts, ModelFacts
from moelocal.model.kv import KVType
from moelocal.plan.cost import Placement, Setting, device_speeds
from moelocal.plan.memory import cache_bytes


def decode_roofline_per_s(facts: ModelFacts, machine: Machine, setting: Setting, n_depth: int) -> float:
    """Tokens per second if nothing but reading took time: the active weights, and the cache of `n_depth` tokens, each
    at the bandwidth of the device that holds it.

    Source: Williams, Waterman, Patterson, "Roofline" (2009); one token at a time is far below every ridge point.
    """
    needed = _bytes_per_token(facts, setting.placement, setting.kv_type, n_depth)
    devices = {device.name: device_speeds(machine, device) for device in machine.devices}
    return 1 / sum(n_bytes / devices[name].bandwidth_bytes_per_s for name, n_bytes in needed.items())


def prefill_roofline_per_s(facts: ModelFacts, machine: Machine, setting: Setting) -> float:
    """Tokens per second if every active weight were multiplied at the fastest rate that its device reaches with any
    type of weights, and nothing else took time."""
    placement, best = setting.placement, {}
    for device in machine.devices:
        speeds = device_speeds(machine, device)
        tables = (*speeds.dense.values(), *speeds.expert.values())
        best[device.name] = max(speed.prefill_weights_per_s for speed in tables)
    active = _bytes_per_token(facts, placement, setting.kv_type, 0)
    weights_per_byte = facts.active_params / max(1.0, sum(active.values()))
    return 1 / sum(n_bytes * weights_per_byte / best[name] for name, n_bytes in active.items())


def _bytes_per_token(facts: ModelFacts, placement: Placement, kv_type: KVType, n_depth: int) -> dict[str, float]:
    """Bytes that one token reads on each device."""
    needed = {placement.output: float(facts.output_bytes + facts.other_bytes)}

    def add(name: str, n_bytes: float) -> None:
        needed[name] = needed.get(name, 0.0) + n_bytes

    for layer, home, where in zip(facts.layers, placement.layers, placement.experts, strict=True):
        add(home, layer.always_active_bytes + cache_bytes(layer, n_depth, kv_type))
        moved = placement.moved().get(layer.index, {}) if placement.parts else {}
        for tensor in layer.expert_tensors:
            add(moved.get(tensor.name, where), tensor.n_bytes * _share(layer, tensor.shape[-1]))
    return needed


def _share(layer: LayerFacts, n_experts: int) -> float:
    return min(layer.n_experts_used, n_experts) / n_experts
