"""Plans for less RAM than the weights need: what is predicted, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moelocal.errors import OutOfMemory
from moelocal.machine.described import parse_machine
from moelocal.model import catalog
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.model.usage import ExpertUsage, LayerUsage, hit_rates
from moelocal.plan.cost import hit_rate
from moelocal.plan.planner import Plan, make_plan
from moelocal.plan.request import PlanRequest

GIB = 1 << 30


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    entry = catalog.find("qwen3-30b-a3b")
    assert entry is not None
    return read_facts(catalog.header_of(entry, "Q4_K_M"))


def planned(facts: ModelFacts, ram: str, disk: str = "2GB/s", ram_bytes: int | None = None) -> Plan:
    machine = parse_machine(f"ram={ram}:40GB/s;disk={disk};cores=8")
    return make_plan(facts, machine, PlanRequest(n_ctx=4096, ram_bytes=ram_bytes))


def test_less_ram_and_a_slower_disk_are_slower(facts: ModelFacts) -> None:
    plans = [planned(facts, ram) for ram in ("32GiB", "16GiB", "12GiB", "8GiB")]
    assert [plan.disk_bytes > 0 for plan in plans] == [False, True, True, True]
    speeds = [plan.predicted.decode_per_s for plan in plans if plan.predicted]
    assert speeds == sorted(speeds, reverse=True) and len(set(speeds)) == 4
    for plan in plans[1:]:
        assert plan.load_mode == "mmap" and not plan.repack
        assert any("read when they are chosen" in reason for reason in plan.reasons)
    slow, fast = planned(facts, "12GiB", "500MB/s").predicted, planned(facts, "12GiB", "5GB/s").predicted
    assert slow and fast and slow.decode_per_s < 0.3 * fast.decode_per_s


def test_a_profile_of_choices_that_repeat_predicts_fewer_misses(facts: ModelFacts) -> None:
    places = (30, 30, 20, *(0,) * 40, *(1,) * 10, *(0,) * 75, 1)
    near = LayerUsage(0, (1,) * 128, (), (128, *(0,) * 128), places)
    known = replace(facts, hit_rates=hit_rates(ExpertUsage("m", "t", 100, 8, (near,))))
    assert known.hit_rates[0] == 0.0 and known.hit_rates[-1] == pytest.approx(90 / 91)
    alike, repeating = planned(facts, "12GiB"), planned(known, "12GiB")
    assert alike.predicted and repeating.predicted
    assert repeating.predicted.decode_per_s > 1.3 * alike.predicted.decode_per_s
    assert any("profile" in reason for reason in repeating.reasons) and alike.disk_bytes == repeating.disk_bytes


def test_hit_rates_are_read_between_their_steps(facts: ModelFacts) -> None:
    known = replace(facts, hit_rates=(0.0, 0.6, 1.0))
    assert [round(hit_rate(known, held), 6) for held in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.3, 0.6, 0.8, 1.0]
    assert hit_rate(facts, 0.3) == 0.3


def test_ram_too_small_for_what_every_token_uses_is_refused_with_the_figure(facts: ModelFacts) -> None:
    with pytest.raises(OutOfMemory, match=r"Every token uses .* of the weights in RAM, and .* missing") as caught:
        planned(facts, "16GiB", ram_bytes=int(1.2 * GIB))
    assert "--ram" in caught.value.hint
    assert planned(facts, "16GiB", ram_bytes=3 * GIB).disk_bytes > 0


def test_long_prompts_go_through_the_file_fewer_times(facts: ModelFacts) -> None:
    machine = parse_machine("ram=12GiB:40GB/s;disk=500MB/s;cores=8")
    request = PlanRequest(objective="long-prompt")
    plan = make_plan(facts, machine, request)
    assert plan.disk_bytes > 0 and plan.n_ubatch > 512
    assert any("read once a batch" in reason for reason in plan.reasons)
    roomy = parse_machine("ram=64GiB:40GB/s;disk=500MB/s;cores=8")
    assert make_plan(facts, roomy, request).n_ubatch == 512
