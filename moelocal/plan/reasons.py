"""Why a plan is as it is, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts
from moelocal.plan.cost import Placement, Setting, device_speeds
from moelocal.plan.memory import CPU, MemoryUse
from moelocal.plan.request import PlanRequest, turn_of
from moelocal.units import format_bytes


def explain(
    facts: ModelFacts,
    here: Machine,
    request: PlanRequest,
    setting: Setting,
    uses: dict[str, MemoryUse],
    disk_bytes: int,
) -> Iterator[str]:
    """Every decision as a sentence, the most important first."""
    if disk_bytes:
        yield (
            f"RAM is {format_bytes(disk_bytes)} too small for the weights: they stay mapped from disk, not repacked, "
            "so nothing is ever killed; what every token uses stays in RAM, experts are read when they are chosen"
        )
        known = (
            "its expert profile" if facts.hit_rates else "no profile, so all experts alike: moelocal experts makes one"
        )
        yield f"How often an expert is missing is estimated from {known}"
    yield from _placement(facts, here, request, setting.placement)
    yield from _context(facts, request, setting)
    yield from _running(facts, here, request, setting, uses, disk_bytes)
    names = {setting.placement.output, CPU, *setting.placement.layers}
    guessed = [d.name for d in here.devices if d.name in names and not device_speeds(here, d).measured]
    if guessed:
        yield f"Speeds of {', '.join(guessed)} are defaults, not measured: moelocal doctor --probe measures them"


def _placement(facts: ModelFacts, here: Machine, request: PlanRequest, placement: Placement) -> Iterator[str]:
    n_layers = len(facts.layers)
    used = [device for device in here.gpus if device.name in placement.layers]
    if not used:
        if request.cpu_only:
            yield "No GPU, as asked"
        elif placement.output != CPU:
            yield f"Only the output head is on {placement.output}: layers do not fit there, or the CPU is faster"
        elif here.gpus:
            yield f"No layers on {', '.join(d.name for d in here.gpus)}: too little memory there, or the CPU is faster"
        if request.experts_on_cpu is not None:
            yield "--experts-on-cpu changes nothing without a GPU: all experts are in RAM"
        return
    for device in used:
        n = placement.layers.count(device.name)
        name = f"{device.name} ({device.description})" if device.description else device.name
        what = "all layers" if n == n_layers else f"{n} of {n_layers} layers"
        yield f"{name} holds what every token uses of {what}: attention, router, norms, KV cache"
    if len(used) > 1:
        yield f"{len(used)} GPUs share the layers by free memory and speed"
    idle = [device.name for device in here.gpus if device not in used]
    if idle:
        yield f"{', '.join(idle)} stays unused: another device more would not make it faster, or holds too little"
    moe = [layer.index for layer in facts.layers if layer.expert_tensors]
    away = [index for index in moe if placement.experts[index] == CPU]
    if moe and not away:
        yield "All routed experts fit there too"
    elif moe:
        is_given = request.experts_on_cpu is not None
        chosen = f", {request.source('experts_on_cpu')}" if is_given else ": the GPU memory that was left"
        yield f"Routed experts of {len(moe) - len(away)} layers are on the GPU{chosen}; {len(away)} layers' are in RAM"
    if placement.parts:
        yield f"One more layer's experts are there in part ({len(placement.parts)} tensors)"


def _context(facts: ModelFacts, request: PlanRequest, setting: Setting) -> Iterator[str]:
    usual = min(turn_of(request).n_ctx, facts.n_ctx_train or turn_of(request).n_ctx)
    if request.n_ctx is not None:
        yield f"{setting.n_ctx:,} tokens of context, as asked"
        if facts.n_ctx_train and request.n_ctx > facts.n_ctx_train:
            yield f"The model was trained for {facts.n_ctx_train:,} tokens only"
    elif setting.n_ctx > usual:
        yield f"{setting.n_ctx:,} tokens of context: there was room for more than the usual {usual:,}"
    elif setting.n_ctx < usual:
        yield f"{setting.n_ctx:,} tokens of context: more does not fit"
    else:
        yield f"{setting.n_ctx:,} tokens of context, usual for {request.objective}"
    if request.kv_type is not None:
        yield f"KV cache as {setting.kv_type}, {request.source('kv_type')}"
    elif setting.kv_type != "f16":
        yield (
            f"KV cache as {setting.kv_type}: about half the memory, which holds more experts on the GPU, at little "
            "cost in quality"
        )


def _running(
    facts: ModelFacts,
    here: Machine,
    request: PlanRequest,
    setting: Setting,
    uses: dict[str, MemoryUse],
    disk_bytes: int,
) -> Iterator[str]:
    if setting.n_ubatch > 512 and request.n_ubatch is None:
        what = "experts that RAM does not hold are read" if disk_bytes else "experts in RAM are copied to the GPU"
        yield f"Prompts in batches of {setting.n_ubatch:,} tokens: {what} once a batch, so fewer batches are faster"
    if uses[CPU].weights_bytes > facts.embedding_bytes and not disk_bytes:
        if request.repack is not None:
            how = "repacked for the CPU" if setting.repack else "not repacked"
            yield f"Weights in RAM are {how}, {request.source('repack')}"
        elif setting.repack:
            yield "Weights in RAM are repacked for the CPU: RAM holds the copy, and it pays for the time to load"
        elif request.one_shot:
            yield "Weights are mapped, not repacked: for one answer that takes longer than it saves"
        elif setting.load_mode == "none":
            yield "Weights in RAM are loaded, not mapped: the GPU copies them faster (not confirmed on a GPU)"
        else:
            yield "Weights in RAM are mapped, not repacked: RAM does not hold the copy, or it would not pay"
    threads = f"{setting.threads} {'thread' if setting.threads == 1 else 'threads'}"
    yield f"{threads}, {request.source('threads')}" if request.threads else f"{threads}: one per core"
    if request.threads_batch:
        yield f"For prompts {request.threads_batch} of them, {request.source('threads_batch')}"
    if request.lossy_misses and disk_bytes:
        yield (
            f"LOSSY, as asked: up to {request.lossy_misses} of a token's chosen experts in a layer are replaced by "
            "the next best in RAM, if they would have to be read"
        )
    elif request.lossy_misses:
        yield "--lossy-misses changes nothing: all weights are in memory"
    if request.flash_attn is not None:
        yield f"Flash attention {'on' if request.flash_attn else 'off'}, {request.source('flash_attn')}"
