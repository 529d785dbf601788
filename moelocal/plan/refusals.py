"""Why nothing fits, and what would: errors of the planner. Pure."""

from __future__ import annotations

from moelocal.errors import OutOfMemory
from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts
from moelocal.plan.cost import Placement
from moelocal.plan.memory import CPU, PROGRAM_BYTES, Sizes
from moelocal.plan.request import N_UBATCH, PlanRequest, bounded
from moelocal.units import format_bytes


def memory_of(here: Machine, request: PlanRequest) -> str:
    """The memory that a model may take, in words: `12.0 GiB of RAM and the GPU`."""
    left = bounded(here, request)
    return f"{format_bytes(left.ram_free_bytes)} of RAM{' and the GPU' if left.gpus else ''}"


def check_gpu_budgets(facts: ModelFacts, here: Machine, request: PlanRequest, n_ctx: int) -> None:
    """Raises OutOfMemory when a GPU was given less than the least that is of use there."""
    if not request.gpu_bytes:
        return
    n_ubatch = min(request.n_ubatch or N_UBATCH, n_ctx)
    sizes = Sizes.of(facts, n_ctx, request.kv_type or "f16", n_ubatch, request.n_outputs)
    layer = min(layer.always_active_bytes + kv for layer, kv in zip(facts.layers, sizes.kv, strict=True))
    head = facts.output_bytes + facts.other_bytes + sizes.extra_kv
    least = sizes.compute + head + layer
    for device in here.gpus:
        named = [size for name, size in request.gpu_bytes if name is None or name.lower() == device.name.lower()]
        if named and device.free_bytes < least and len(here.gpus) == 1:
            raise OutOfMemory(
                f"{device.name} may use {format_bytes(device.free_bytes)}, and {format_bytes(least)} are the least: "
                f"{format_bytes(sizes.compute)} to compute, {format_bytes(head)} for the output head, "
                f"{format_bytes(layer)} for one layer.",
                f"Try --gpu-memory {-(-least >> 20) + 1}MiB, a shorter --ctx, or --cpu-only.",
            )


def check_ram_for_always_used(facts: ModelFacts, placement: Placement, left_bytes: int) -> None:
    """Raises OutOfMemory when RAM cannot even hold what every token uses: all of it would be read for every token."""
    at_home = zip(facts.layers, placement.layers, strict=True)
    always = sum(layer.always_active_bytes for layer, home in at_home if home == CPU)
    always += facts.output_bytes if placement.output == CPU else 0
    if left_bytes < always:
        missing = always - left_bytes
        raise OutOfMemory(
            f"Every token uses {format_bytes(always)} of the weights in RAM, and {format_bytes(max(0, left_bytes))} "
            f"are left for them: {format_bytes(missing)} are missing.",
            "Close other programs, give a larger --ram or a shorter --ctx, or choose a smaller model.",
        )


def too_little(facts: ModelFacts, here: Machine, request: PlanRequest, n_ctx: int) -> OutOfMemory:
    """What is missing at `n_ctx`, and what would fit."""
    if request.experts_on_cpu is not None and here.gpus:
        return OutOfMemory(
            f"With the experts of only {request.experts_on_cpu} layers in RAM the rest does not fit the GPU.",
            "Give --experts-on-cpu a larger number, or leave it out: the planner finds it.",
        )
    kv_type, n_ubatch = request.kv_type or "f16", request.n_ubatch or N_UBATCH

    def need(n_ctx: int) -> int:
        sizes = Sizes.of(facts, n_ctx, kv_type, n_ubatch, request.n_outputs)
        return sum(sizes.kv) + sizes.extra_kv + sizes.ram_compute + PROGRAM_BYTES

    shorter = n_ctx
    while shorter > 256 and need(shorter) > here.ram_free_bytes:
        shorter //= 2
    fits = need(shorter) <= here.ram_free_bytes
    return OutOfMemory(
        f"A context of {n_ctx:,} tokens needs {format_bytes(need(n_ctx))} of RAM for its cache and to compute, and "
        f"{format_bytes(here.ram_free_bytes)} are available.",
        f"Try --ctx {shorter}." if fits else f"At least {format_bytes(need(256))} are needed, whatever the context.",
    )
