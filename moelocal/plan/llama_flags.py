"""A placement in llama.cpp's own terms: for the engine, and as flags for people who use llama-server. Pure.

llama.cpp gives the last `n_gpu_layers` layers (the output head counts as the last one) to its devices in order, in the
proportions of `tensor_split`; the layer's KV cache goes along. Whatever differs from that is a tensor override: a
regular expression and a buffer type, the first match counts.

Source: llama.cpp 0c1e57098, src/llama-model.cpp, load_tensors; src/llama-model-loader.cpp, create_tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from moelocal.errors import BadRequest

if TYPE_CHECKING:
    from moelocal.model.facts import ModelFacts
    from moelocal.model.header import GGUFHeader
    from moelocal.plan.cost import Placement, Setting
    from moelocal.plan.planner import Plan

CPU = "CPU"
# `ffn_norm_exps` is a norm and `ffn_gate_inp` the router: neither may leave its layer
_EXPERTS = r"ffn_(gate|up|down|gate_up)_(ch)?exps\."
_OUTPUT = r"^(output|token_embd)\."  # tied: the head is a second copy of the embedding, under its name
_OFFLOAD_MIN_BATCH = 32  # llama.cpp's default, made for dense layers


class LlamaFlags(NamedTuple):
    """`devices` to use, in order (None: llama.cpp's choice; none at all: CPU only); `tensor_split`: layers of each one;
    `overrides` as (regular expression, device); `experts_used`: a metadata key and the number to use instead."""

    devices: tuple[str, ...] | None = None
    n_gpu_layers: int = 0
    tensor_split: tuple[float, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()
    experts_used: tuple[str, int] | None = None


def flags_of(placement: Placement, n_ahead: int = 0) -> LlamaFlags:
    """llama.cpp's settings for a placement.

    Args:
        n_ahead: layers in the file behind those of the placement (prediction layers): counted, but not loaded.

    Raises:
        BadRequest: an order that llama.cpp cannot express: the CPU's layers come first, each device's are neighbours.
    """
    layers = placement.layers
    n_cpu = next((i for i, name in enumerate(layers) if name != CPU), len(layers))
    order = list(dict.fromkeys(layers[n_cpu:]))
    neighbours = [name for i, name in enumerate(layers) if i >= n_cpu and (i == n_cpu or layers[i - 1] != name)]
    if CPU in order or neighbours != order:
        raise BadRequest(
            "llama.cpp takes the layers of one device only as neighbours, and the CPU's in front.",
            "Leave the placement to the planner.",
        )
    overrides = _expert_overrides(placement)
    tail = [*layers[n_cpu:], *layers[-1:] * n_ahead] if order else []
    if placement.output != CPU and (not order or placement.output not in order):
        order.append(placement.output)
        tail.append(placement.output)
    elif order:
        tail.append(order[-1])
        if placement.output != order[-1]:
            overrides.append((_OUTPUT, placement.output))
    order += sorted({name for _, name in overrides} - {*order, CPU})  # they hold experts only
    return LlamaFlags(tuple(order), len(tail), tuple(float(tail.count(name)) for name in order), tuple(overrides))


def flags_of_plan(plan: Plan, header: GGUFHeader) -> LlamaFlags:
    """llama.cpp's settings for a plan. One without a placement leaves the choice of GPUs to llama.cpp."""
    arch = header.metadata.get("general.architecture")
    used = None if plan.experts_used is None else (f"{arch}.expert_used_count", plan.experts_used)
    if plan.placement is None:
        return LlamaFlags(None if plan.n_gpu_layers else (), plan.n_gpu_layers, experts_used=used)
    n_layers = header.metadata.get(f"{arch}.block_count", 0)
    flags = flags_of(plan.placement, max(0, int(n_layers) - len(plan.placement.layers)))
    return flags._replace(experts_used=used)


def _expert_overrides(placement: Placement) -> list[tuple[str, str]]:
    moved: dict[str, list[int]] = {}
    for index, (home, experts) in enumerate(zip(placement.layers, placement.experts, strict=True)):
        if experts != home:
            moved.setdefault(experts, []).append(index)
    parts = [(f"^{re.escape(tensor)}$", name) for tensor, name in placement.parts]
    return parts + [(rf"^blk\.({'|'.join(map(str, indices))})\.{_EXPERTS}", name) for name, indices in moved.items()]


def offload_min_batch(facts: ModelFacts) -> int | None:
    """Prompt tokens from which copying a layer's experts to the GPU pays: all of them cross the bus, a token uses few.

    None: llama.cpp's own. The public rule, 32 x experts / used; not confirmed on a GPU.
    """
    if not facts.n_experts or not facts.n_experts_used:
        return None
    return -(-_OFFLOAD_MIN_BATCH * facts.n_experts // facts.n_experts_used)


def llama_args(setting: Setting, workers: Mapping[str, str] | None = None) -> list[str]:
    """The same as flags of llama-server and its siblings.

    Args:
        workers: all devices elsewhere (llama.cpp counts them in the order of --rpc), each with the name of its buffers:
            `RPC1` -> `RPC0[192.168.1.5:50052]`.
    """
    flags, names = flags_of(setting.placement), workers or {}
    args: list[str] = []
    if any(name in names for name in flags.devices or ()):
        args = ["--rpc", ",".join(dict.fromkeys(name.partition("[")[2].rstrip("]") for name in names.values()))]
    args += ["-dev", ",".join(flags.devices) if flags.devices else "none", "-ngl", str(flags.n_gpu_layers)]
    if len(flags.tensor_split) > 1:
        args += ["-ts", ",".join(f"{share:g}" for share in flags.tensor_split)]
    if flags.overrides:
        args += ["-ot", ",".join(f"{pattern}={names.get(name, name)}" for pattern, name in flags.overrides)]
    args += ["-c", str(setting.n_ctx), "-ctk", setting.kv_type, "-ctv", setting.kv_type]
    args += ["-b", str(setting.n_ubatch), "-ub", str(setting.n_ubatch), "-t", str(setting.threads)]
    args += ["-lm", setting.load_mode, "-np", "1", "-fit", "off"]
    return args if setting.repack else [*args, "--no-repack"]
