"""What a model would do on a machine, in one word and one line: for lists of models and for `show`. Pure.

    outcome(facts, machine)      # Outcome("experts in RAM", 55.9, 0)

Only one ubatch is weighed, which changes prompts more than answers: a whole catalog takes a second or two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moelocal.errors import OutOfMemory
from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts
from moelocal.plan.memory import CPU
from moelocal.plan.planner import Plan, make_plan
from moelocal.plan.request import PlanRequest
from moelocal.units import format_bytes

Kind = Literal["fits the GPU", "experts in RAM", "in RAM", "needs disk", "too large"]
_REQUEST = PlanRequest(n_ubatch=512)
_LEAST_PER_S = 0.1  # ten seconds a token: nobody waits for an answer at that speed


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a model would live, its tokens per second (None: it does not run at all), bytes left on the disk."""

    kind: Kind
    decode_per_s: float | None = None
    disk_bytes: int = 0


def outcome(facts: ModelFacts, machine: Machine) -> Outcome:
    """What a model would do here, about."""
    try:
        return outcome_of(make_plan(facts, machine, _REQUEST))
    except OutOfMemory:
        return Outcome("too large")


def outcome_of(plan: Plan) -> Outcome:
    """What a plan comes to."""
    speeds = plan.measured or plan.predicted
    per_s = speeds.decode_per_s if speeds else None
    if plan.disk_bytes:
        is_hopeless = per_s is not None and per_s < _LEAST_PER_S
        return Outcome("too large" if is_hopeless else "needs disk", per_s, plan.disk_bytes)
    homes = plan.placement.layers if plan.placement else ()
    experts = plan.placement.experts if plan.placement else ()
    if all(home == CPU for home in homes):
        return Outcome("in RAM", per_s)
    return Outcome("experts in RAM" if CPU in (*homes, *experts) else "fits the GPU", per_s)


def sentence(plan: Plan, facts: ModelFacts) -> str:
    """The plan in one line: `Experts of 23 layers on the GPU, of 25 in RAM: about 50 tokens/s.`"""
    found = outcome_of(plan)
    speed = f"{_about(found.decode_per_s)} tokens/s" if found.decode_per_s else "speed unknown"
    speed = f"{speed} measured here" if plan.measured else f"about {speed}"
    if found.disk_bytes:
        return f"{format_bytes(found.disk_bytes)} more than memory holds, read from disk again and again: {speed}."
    if found.kind in ("fits the GPU", "in RAM"):
        where = "in RAM" if found.kind == "in RAM" else "on the GPU"
        return f"All of it {where}: {speed}."
    held = plan.expert_layers(facts) if facts.is_moe else {}
    away = len(held.get(CPU, ()))
    near = sum(len(layers) for name, layers in held.items() if name != CPU)
    if not facts.is_moe or plan.placement is None or CPU in plan.placement.layers:
        n = sum(home != CPU for home in plan.placement.layers) if plan.placement else 0
        return f"{n} of {len(facts.layers)} layers on the GPU, the rest in RAM: {speed}."
    return f"Experts of {near} layers on the GPU, of {away} in RAM: {speed}."


def _about(per_s: float) -> str:
    return f"{per_s:.0f}" if per_s >= 10 else f"{per_s:.1f}"
