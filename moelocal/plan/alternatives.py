"""What one step away from a plan would change: predicted by planning again with that step taken. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from moelocal.errors import BadRequest, OutOfMemory
from moelocal.machine.hardware import Machine
from moelocal.model.facts import LayerFacts, ModelFacts, TypeBytes
from moelocal.plan.memory import CPU
from moelocal.plan.planner import Alternative, Plan, make_plan
from moelocal.plan.request import PlanRequest

if TYPE_CHECKING:
    from moelocal.plan.calibration import Calibration

# Bits per weight of whole files, about. Source: llama.cpp 0c1e57098, tools/quantize/README.md.
_BITS = {
    "Q8_0": 8.5, "Q6_K": 6.57, "Q5_K_M": 5.7, "Q4_K_M": 4.89, "Q4_K_S": 4.67, "IQ4_XS": 4.46, "Q3_K_M": 4.0,
    "Q3_K_S": 3.64, "Q2_K": 3.16, "IQ2_M": 2.93,
}  # fmt: skip


def with_alternatives(
    facts: ModelFacts, machine: Machine, request: PlanRequest, plan: Plan, history: Calibration | None = None
) -> Plan:
    """The plan with what one step would change; steps that change nothing or do not fit are left out."""
    found: list[Alternative] = []
    for change, other, wanted in _steps(facts, request, plan):
        try:
            trial = make_plan(other, machine, wanted, history)
        except (OutOfMemory, BadRequest):
            continue
        if trial.predicted is not None and (trial.setting != plan.setting or other is not facts):
            now_fits = _n_away(facts, plan) and not _n_away(other, trial) and trial.n_gpu_layers
            note = ": all experts fit on the GPU" if now_fits else ""
            found.append(Alternative(change + note, round(trial.predicted.decode_per_s, 2), trial.total_bytes))
    return replace(plan, alternatives=tuple(found))


def _n_away(facts: ModelFacts, plan: Plan) -> int:
    """Layers whose experts are in RAM."""
    return len(plan.expert_layers(facts).get(CPU, []))


def _steps(facts: ModelFacts, request: PlanRequest, plan: Plan) -> Iterator[tuple[str, ModelFacts, PlanRequest]]:
    fixed = replace(request, n_ctx=plan.n_ctx)
    held = plan.expert_layers(facts)
    n_moe, n_away = sum(map(len, held.values())), _n_away(facts, plan)
    if n_away < n_moe:
        more = f"experts of one more layer in RAM (--experts-on-cpu {n_away + 1})"
        yield more, facts, replace(fixed, experts_on_cpu=n_away + 1)
    if n_moe and plan.n_gpu_layers and n_away not in (0, n_moe):
        yield f"all experts in RAM (--experts-on-cpu {n_moe})", facts, replace(fixed, experts_on_cpu=n_moe)
    coarser = "q8_0" if plan.kv_type == "f16" else "q4_0"
    if plan.kv_type != "q4_0" and facts.fits_kv_type("q8_0"):
        yield f"KV cache {coarser} instead of {plan.kv_type}", facts, replace(fixed, kv_type="q8_0")
    for n_ctx in (plan.n_ctx * 2, plan.n_ctx // 2):
        if 512 <= n_ctx <= (facts.n_ctx_train or n_ctx):
            yield f"context {n_ctx:,} instead of {plan.n_ctx:,}", facts, replace(fixed, n_ctx=n_ctx)
    if plan.n_gpu_layers:
        yield "without a GPU (--cpu-only)", facts, replace(fixed, cpu_only=True, gpu_bytes=(), experts_on_cpu=None)
    if facts.total_params:
        bits = facts.total_bytes * 8 / facts.total_params
        for name in _neighbours(bits):
            yield f"about {name} instead of {facts.quant}", scaled(facts, _BITS[name] / bits), fixed


def _neighbours(bits: float) -> list[str]:
    """The next quantizations at least a twentieth smaller and larger."""
    smaller = [name for name, size in _BITS.items() if size < bits * 0.95]
    larger = [name for name, size in _BITS.items() if size > bits * 1.05]
    return smaller[:1] + larger[-1:]


def scaled(facts: ModelFacts, ratio: float) -> ModelFacts:
    """The same model with so many times the bytes, its types called what they were."""

    def types(held: TypeBytes) -> TypeBytes:
        return tuple((name, int(size * ratio)) for name, size in held)

    def layer(one: LayerFacts) -> LayerFacts:
        tensors = tuple(t._replace(n_bytes=int(t.n_bytes * ratio)) for t in one.expert_tensors)
        return replace(
            one,
            attention_bytes=int(one.attention_bytes * ratio),
            dense_ffn_bytes=int(one.dense_ffn_bytes * ratio),
            shared_expert_bytes=int(one.shared_expert_bytes * ratio),
            routed_expert_bytes=sum(tensor.n_bytes for tensor in tensors),
            active_expert_bytes=int(one.active_expert_bytes * ratio),
            expert_tensors=tensors,
            dense_types=types(one.dense_types),
        )

    return replace(
        facts,
        layers=tuple(layer(one) for one in facts.layers),
        embedding_bytes=int(facts.embedding_bytes * ratio),
        output_bytes=int(facts.output_bytes * ratio),
        tied_output_bytes=int(facts.tied_output_bytes * ratio),
        output_types=types(facts.output_types),
    )
