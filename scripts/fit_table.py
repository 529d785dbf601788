"""Prints where llama.cpp's own `--fit` and moelocal would put real models, and what our cost model says of both.

usage: python scripts/fit_table.py

Markdown, for docs/fit.md. `--fit` is the reading of its rules in tests/plan/llama_fit.py. No GPU is used or needed: all
speeds are predictions. About 10 s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.errors import OutOfMemory
from moelocal.machine.described import parse_machine
from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.plan.cost import Prediction, Setting, predict
from moelocal.plan.memory import CPU, Sizes, placed, ram_left
from moelocal.plan.planner import PlanRequest, make_plan
from moelocal.plan.request import turn_of
from tests.model.real_numbers import REAL
from tests.plan.llama_fit import Fit

GIB = 1 << 30
MODELS = (
    "olmoe-1b-7b", "lfm2-8b-a1b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "gpt-oss-20b", "qwen3-30b-a3b",
    "granite-4-h-small", "mixtral-8x7b", "qwen3-next-80b-a3b", "glm-4.5-air", "gpt-oss-120b", "qwen3-235b-a22b",
)  # fmt: skip
MACHINES = {
    "8 GB, RAM 32 GB": "gpu=RTX 4060:8GB;ram=32GB:60GB/s;cores=8",
    "12 GB, RAM 32 GB": "gpu=RTX 4070:12GB;ram=32GB:60GB/s;cores=8",
    "24 GB, RAM 64 GB": "gpu=RTX 4090:24GB;ram=64GB:60GB/s;cores=8",
    "12 + 8 GB, RAM 64 GB": "gpu=RTX 4070:12GB;gpu=RTX 4060:8GB;ram=64GB:60GB/s;cores=8",
}


class Rival(NamedTuple):
    """What `--fit` does: its context, the prediction, and by how many bytes its part in RAM is above what is free."""

    n_ctx: int
    speeds: Prediction
    over_bytes: int


def rival(facts: ModelFacts, machine: Machine) -> Rival:
    """`--fit` with llama.cpp's defaults: the model's whole context, shrunk if it must be; f16, 512 tokens at once."""
    fit, turn = Fit(facts, machine), turn_of(PlanRequest())
    setting = Setting(fit.placement, fit.n_ctx, "f16", 512, machine.cpu.cores, repack=False, load_mode="mmap")
    speeds = predict(facts, machine, setting, turn.n_prompt, min(turn.n_depth, fit.n_ctx))
    uses = placed(facts, machine, fit.placement, Sizes.of(facts, fit.n_ctx, "f16", 512))
    return Rival(fit.n_ctx, speeds, uses[CPU].weights_bytes - ram_left(machine, uses))


def turn_s(speeds: Prediction) -> float:
    """Seconds of the turn that a plan makes short."""
    turn = turn_of(PlanRequest())
    return speeds.first_token_s + turn.n_answer / speeds.decode_per_s + turn.load_share * speeds.load_s


def thousands(n_ctx: int) -> str:
    """A context, as people say it."""
    return f"{n_ctx / 1024:.3g}k"


def line(facts: ModelFacts, machine: Machine) -> tuple[str, float | None]:
    """Cells of one model on one machine, and the ratio of the turns; None when RAM does not even hold the caches."""
    try:
        own = make_plan(facts, machine, PlanRequest())
    except OutOfMemory:
        return "does not fit | | | | | |", None
    theirs = rival(facts, machine)
    ram = "yes" if theirs.over_bytes <= 0 else f"{theirs.over_bytes / GIB:.0f} GiB over"
    cells = [thousands(theirs.n_ctx), f"{theirs.speeds.decode_per_s:.1f}", ram, thousands(own.n_ctx)]
    assert own.predicted is not None
    on_disk = "" if own.fits else f", {own.disk_bytes / GIB:.0f} GiB on disk"
    cells.append(f"{own.predicted.decode_per_s:.1f}, {own.kv_type}{on_disk}")
    same = make_plan(facts, machine, PlanRequest(n_ctx=theirs.n_ctx)).predicted
    assert same is not None
    ratio = turn_s(theirs.speeds) / turn_s(same)
    return " | ".join([*cells, f"{same.decode_per_s / theirs.speeds.decode_per_s:.2f}", f"{ratio:.2f}"]), ratio


def table(text: str) -> Iterator[str]:
    """All models on one machine."""
    yield "| model | fit: context | tokens/s | in RAM? | ours: context | tokens/s | decode ratio | turn ratio |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    machine, ratios = parse_machine(text), []
    for name in MODELS:
        facts = read_facts(REAL[name]().header)
        cells, ratio = line(facts, machine)
        yield f"| {name} {facts.quant} | {cells} |"
        ratios += [] if ratio is None else [ratio]
    middle = sorted(ratios)[len(ratios) // 2]
    yield f"\nTurn ratio: median {middle:.2f}, least {min(ratios):.2f}, most {max(ratios):.2f}."


def main() -> int:
    for name, text in MACHINES.items():
        print(f'### {name}\n\n`--machine "{text}"`\n', *table(text), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
