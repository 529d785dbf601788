"""The choice of a quantization: a reviewed table of machines, and what holds for every choice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, cast

import pytest

from moelocal.machine.described import parse_machine
from moelocal.model.catalog import facts_of, find
from moelocal.model.facts import read_facts
from moelocal.model.rescale import main_type, resized
from moelocal.plan.choose import Candidate, Choice, choose
from moelocal.plan.planner import PlanRequest, make_plan
from moelocal.plan.request import Objective
from tests.model.geometries import qwen3_30b_a3b

QUANTS = ("BF16", "Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


FAST = {
    "chat": "the most exact one that answers with 20 tokens/s or more",
    "long-prompt": "the most exact one that reads a long prompt in 30 s and answers with 10 tokens/s",
    "throughput": "the most exact one that keeps 70% of the highest speed",
}
FINE = {
    key: f"it {told.removeprefix('the most exact one that ')}, and more exact ones bring no gain to be noticed"
    for key, told in FAST.items()
}
REASONS = {
    "not fast": "nothing answers with 20 tokens/s or more here, and four bits are where larger ones only get slower",
    "three bits": "with four bits nothing here answers as fast as people read; with three bits it does",
    "slow": "nothing good is fast here; this is the fastest that still is good",
    "fits": "the most exact one that fits and answers as fast as people read",
    "very slow": "nothing is fast here; this is the most exact one of up to four bits",
    "too large": "not even the smallest fits",
}

# Reviewed by hand: is it what a person who knows the model and the machine would take, for the reason given?
TABLE = """
# qwen3-30b-a3b chat
ram=16GiB:50GB/s -> Q2_K: fits
ram=32GiB:60GB/s -> Q4_K_M: not fast
ram=64GiB:80GB/s;cores=12 -> Q4_K_M: fast
ram=128GiB:80GB/s;cores=16 -> Q5_K_M: fast
ram=256GiB:200GB/s;cores=32 -> Q6_K: fine
gpu=RTX 4060:8GiB:272GB/s;ram=16GiB:50GB/s -> Q5_K_M: fast
gpu=RTX 4060:8GiB:272GB/s;ram=32GiB:60GB/s -> Q6_K: fine
gpu=RTX 2080:8GiB:448GB/s;ram=64GiB:45GB/s -> Q6_K: fast
gpu=RTX 4070:12GiB:504GB/s;ram=16GiB:50GB/s -> Q6_K: fast
gpu=RTX 4070:12GiB:504GB/s;ram=32GiB:60GB/s -> Q6_K: fine
gpu=RTX 4070:12GiB:504GB/s;ram=96GiB:80GB/s -> Q6_K: fine
gpu=RTX 4080:16GiB:717GB/s;ram=32GiB:60GB/s -> Q6_K: fine
gpu=RTX 5080:16GiB:960GB/s;ram=64GiB:90GB/s;cores=16 -> Q6_K: fine
gpu=RX 7900 XTX:24GiB:960GB/s;ram=32GiB:60GB/s -> Q6_K: fine
gpu=RTX 4090:24GiB:1008GB/s;ram=64GiB:80GB/s -> Q6_K: fine
gpu=RTX 4090:24GiB:1008GB/s;ram=128GiB:90GB/s;cores=16 -> Q6_K: fine
gpu=RTX 3090:24GiB:936GB/s;gpu=RTX 3090:24GiB:936GB/s;ram=64GiB:60GB/s -> Q6_K: fine
gpu=RTX 4060 Ti:16GiB:288GB/s;gpu=RTX 4060 Ti:16GiB:288GB/s;ram=64GiB:80GB/s -> Q6_K: fine
gpu=RTX A6000:48GiB:768GB/s;ram=128GiB:80GB/s -> Q6_K: fine
gpu=RTX 6000 Ada:48GiB:960GB/s;gpu=RTX 4070:12GiB:504GB/s;ram=256GiB:200GB/s;cores=32 -> Q6_K: fine
# glm-4.5-air chat
ram=64GiB:80GB/s;cores=12 -> Q3_K_M: slow
ram=128GiB:80GB/s;cores=16 -> Q4_K_S: slow
ram=256GiB:200GB/s;cores=32 -> Q4_K_S: not fast
gpu=RTX 2080:8GiB:448GB/s;ram=64GiB:45GB/s -> Q3_K_M: three bits
gpu=RTX 4070:12GiB:504GB/s;ram=96GiB:80GB/s -> Q4_K_S: not fast
gpu=RTX 5080:16GiB:960GB/s;ram=64GiB:90GB/s;cores=16 -> Q4_K_S: not fast
gpu=RTX 4090:24GiB:1008GB/s;ram=128GiB:90GB/s;cores=16 -> Q4_K_S: fast
gpu=RTX 3090:24GiB:936GB/s;gpu=RTX 3090:24GiB:936GB/s;ram=64GiB:60GB/s -> Q4_K_M: fast
gpu=RTX A6000:48GiB:768GB/s;ram=128GiB:80GB/s -> Q4_K_M: fast
gpu=RTX 6000 Ada:48GiB:960GB/s;gpu=RTX 4070:12GiB:504GB/s;ram=256GiB:200GB/s;cores=32 -> Q6_K: fine
gpu=RTX 4080:16GiB:717GB/s;ram=32GiB:60GB/s -> Q2_K: fits
gpu=RTX 4060:8GiB:272GB/s;ram=16GiB:50GB/s -> -: too large
# qwen3-30b-a3b long-prompt
ram=32GiB:60GB/s -> Q4_K_M: very slow
# qwen3-30b-a3b throughput
ram=32GiB:60GB/s -> Q6_K: fast
# qwen3-30b-a3b long-prompt
gpu=RTX 4070:12GiB:504GB/s;ram=32GiB:60GB/s -> Q6_K: fine
# qwen3-30b-a3b throughput
gpu=RTX 4070:12GiB:504GB/s;ram=32GiB:60GB/s -> Q4_K_M: fast
# qwen3-30b-a3b long-prompt
gpu=RTX 4090:24GiB:1008GB/s;ram=64GiB:80GB/s -> Q6_K: fine
# qwen3-30b-a3b throughput
gpu=RTX 4090:24GiB:1008GB/s;ram=64GiB:80GB/s -> Q6_K: fast
# qwen3-30b-a3b long-prompt
gpu=RTX 3090:24GiB:936GB/s;gpu=RTX 3090:24GiB:936GB/s;ram=64GiB:60GB/s -> Q8_0: fine
# qwen3-30b-a3b throughput
gpu=RTX 3090:24GiB:936GB/s;gpu=RTX 3090:24GiB:936GB/s;ram=64GiB:60GB/s -> Q6_K: fast
"""


class Case(NamedTuple):
    machine: str
    model: str
    objective: Objective
    label: str
    reason: str


def cases() -> Iterator[Case]:
    model, objective = "", ""
    for line in TABLE.strip().splitlines():
        if line.startswith("#"):
            _, model, objective = line.split()
            continue
        machine, _, found = line.partition(" -> ")
        label, _, name = found.partition(": ")
        told = FAST[objective] if name == "fast" else FINE[objective] if name == "fine" else REASONS[name]
        yield Case(machine, model, cast(Objective, objective), label, told)


CASES = tuple(cases())


@cache
def candidates(model: str) -> tuple[Candidate, ...]:
    entry = find(model)
    assert entry is not None
    made = []
    for quant in QUANTS:
        facts = facts_of(entry, quant)
        made.append(Candidate(quant, facts.total_bytes, facts))
    return tuple(made)


@cache
def chosen(model: str, machine: str, objective: Objective) -> Choice:
    return choose(candidates(model), parse_machine(machine), PlanRequest(objective=objective))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model} {case.objective} {case.machine}")
def test_the_reviewed_table(case: Case) -> None:
    choice = chosen(case.model, case.machine, case.objective)
    assert (choice.best.label if choice.best else "-") == case.label
    assert choice.reason.startswith(case.reason)
    assert len(choice.neighbours) >= bool(choice.best)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model} {case.objective} {case.machine}")
def test_the_reason_is_true(case: Case) -> None:
    choice = chosen(case.model, case.machine, case.objective)
    if choice.best is None or choice.best.pace < 1 or choice.best.bits < 4.2:
        return
    is_finest = all(one.bits <= choice.best.bits for one in choice.options if one.fits and one.pace >= 1)
    assert choice.reason.startswith("the most exact one" if is_finest else "it ")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model} {case.objective} {case.machine}")
def test_no_choice_that_plans_not_to_fit(case: Case) -> None:
    choice = chosen(case.model, case.machine, case.objective)
    assert [option.n_bytes for option in choice.options] == sorted(option.n_bytes for option in choice.options)
    if choice.best is None:
        assert all(option.why_not for option in choice.options)
        return
    assert choice.best.fits and choice.best.plan is not None and choice.best.plan.fits
    assert not choice.best.plan.disk_bytes and choice.best.plan.n_ctx >= 4096


def test_the_table_has_twenty_machines() -> None:
    assert len({case.machine for case in CASES}) == 20


def test_what_the_disk_has_no_room_for_is_not_chosen() -> None:
    machine = parse_machine("gpu=RTX 4090:24GiB:1008GB/s;ram=64GiB:80GB/s")
    choice = choose(candidates("qwen3-30b-a3b"), machine, PlanRequest(), room_bytes=20_000_000_000)
    assert choice.best is not None and choice.best.label == "Q4_K_M"
    assert "more than the disk has room for" in choice.neighbours[0]
    assert choose((), machine, PlanRequest()).best is None


def test_a_context_that_was_asked_for_counts() -> None:
    machine = parse_machine("ram=32GiB:60GB/s")
    long = choose(candidates("qwen3-30b-a3b"), machine, PlanRequest(n_ctx=40_960))
    assert long.best is not None and long.best.plan is not None and long.best.plan.n_ctx == 40_960


@pytest.mark.parametrize("quant", ["Q2_K", "Q4_K_M", "Q6_K", "Q8_0"])
def test_a_header_rescaled_plans_as_the_real_one(quant: str) -> None:
    real = next(one for one in candidates("qwen3-30b-a3b") if one.label == quant)
    made = read_facts(resized(qwen3_30b_a3b().header, quant, real.n_bytes))
    assert made.quant == quant and made.total_params == pytest.approx(real.facts.total_params, rel=1e-3)
    assert made.total_bytes == pytest.approx(real.n_bytes, rel=1e-3)
    machine = parse_machine("gpu=RTX 4070:12GiB:504GB/s;ram=64GiB:60GB/s")
    plans = [make_plan(facts, machine, PlanRequest(n_ctx=8192)) for facts in (made, real.facts)]
    speeds = [plan.predicted.decode_per_s for plan in plans if plan.predicted]
    assert speeds[0] == pytest.approx(speeds[1], rel=0.15)


@pytest.mark.parametrize(
    ("quant", "kind"),
    [
        ("Q4_K_M", "Q4_K"),
        ("UD-Q4_K_XL", "Q4_K"),
        ("UD-Q8_K_XL", "Q8_0"),
        ("IQ3_M", "IQ3_S"),
        ("IQ4_XS", "IQ4_XS"),
        ("IQ4_NL", "IQ4_NL"),
        ("MXFP4_MOE", "MXFP4"),
        ("fp16", "F16"),
        ("BF16", "BF16"),
        ("Q4_0", "Q4_0"),
        ("unknown", None),
        ("", None),
    ],
)
def test_the_type_that_a_quantization_is_named_after(quant: str, kind: str | None) -> None:
    assert main_type(quant) == kind


def test_what_is_here_already_needs_no_room() -> None:
    machine, options = parse_machine("ram=64GiB:80GB/s;cores=12"), candidates("qwen3-30b-a3b")
    room = 1 << 30
    assert choose(options, machine, PlanRequest(), room).best is None
    begun = [one._replace(missing_bytes=room // 2) if one.label == "Q4_K_M" else one for one in options]
    best = choose(begun, machine, PlanRequest(), room).best
    assert best is not None and best.label == "Q4_K_M"
