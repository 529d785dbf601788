"""Predictions corrected by measurement: what one run teaches, what an odd one does not, and what stays as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.model.header import read_header
from moelocal.plan.alternatives import with_alternatives
from moelocal.plan.calibration import Calibration, Difference, Run, median
from moelocal.plan.cost import Setting, Work, predict
from moelocal.plan.planner import Plan, PlanRequest, make_plan
from tests.conftest import DEMO
from tests.model.geometries import qwen3_30b_a3b
from tests.plan.models import GIB, gpu, machine

RTX = gpu(12 * GIB)
CHAT = PlanRequest()


@pytest.fixture(scope="module")
def demo() -> ModelFacts:
    return read_facts(read_header(DEMO))


@pytest.fixture(scope="module")
def qwen() -> ModelFacts:
    return read_facts(qwen3_30b_a3b().header)


def run(setting: Setting | None, decode_per_s: float, prefill_per_s: float, n_prompt: int = 300, n: int = 100) -> Run:
    assert setting is not None
    prompt_s = n_prompt / prefill_per_s
    return Run(setting, 28 * GIB, n_prompt, prompt_s, prompt_s, n_prompt + n // 2, n, n / decode_per_s, 1.0)


def as_computed(facts: ModelFacts, here: Machine, setting: Setting | None, times: float = 1.0) -> Run:
    """A run that took so many times what the cost model says."""
    assert setting is not None
    told = predict(facts, here, setting, 300, 350)
    return run(setting, told.decode_per_s / times, told.prefill_per_s / times)


def corrected(facts: ModelFacts, here: Machine, runs: list[Run], at: Run) -> tuple[float, float]:
    """Decode and prefill per second that these runs make of the prediction for one run's own tokens."""
    s = at.setting
    work = Work(s.kv_type, s.n_ubatch, s.threads, s.repack, s.load_mode, at.n_prompt, at.n_depth)
    by = Calibration(facts, here, runs).correction(work, s.placement)
    told = predict(facts, here, s, at.n_prompt, at.n_depth, by)
    return told.decode_per_s, told.prefill_per_s


@given(decode=st.floats(0.01, 1e5), prefill=st.floats(1, 1e6), n_prompt=st.integers(32, 4000), n=st.integers(16, 900))
def test_after_one_run_the_prediction_is_what_was_measured(
    decode: float, prefill: float, n_prompt: int, n: int
) -> None:
    facts, here = read_facts(read_header(DEMO)), machine()
    measured = run(make_plan(facts, here, CHAT).setting, decode, prefill, n_prompt, n)
    assert corrected(facts, here, [measured], measured) == pytest.approx((decode, prefill))


@pytest.mark.parametrize("here", [machine(), machine(28 * GIB, RTX), machine(12 * GIB)], ids=["cpu", "gpu", "disk"])
def test_it_holds_on_every_kind_of_machine(qwen: ModelFacts, here: Machine) -> None:
    plan = make_plan(qwen, here, CHAT)
    measured = run(plan.setting, 7.0, 50.0)._replace(ram_bytes=here.ram_free_bytes)
    assert corrected(qwen, here, [measured], measured) == pytest.approx((7.0, 50.0), rel=0.02)
    again = make_plan(qwen, here, CHAT, Calibration(qwen, here, [measured]))
    assert again.measured is not None and again.measured[:2] == pytest.approx((7.0, 50.0))
    assert any("corrected by 1 run" in reason for reason in again.reasons)


def test_one_odd_run_changes_nothing(demo: ModelFacts) -> None:
    here = machine()
    setting = make_plan(demo, here, CHAT).setting
    usual = [run(setting, 100.0 + n, 1000.0 + n) for n in range(4)]
    for at in range(5):
        runs = [*usual[:at], run(setting, 3.0, 9.0), *usual[at:]]
        assert corrected(demo, here, runs, usual[0]) == pytest.approx((101.5, 1001.5), rel=0.02)
        found = Calibration(demo, here, runs).measured(usual[0].setting)
        assert found is not None and found[:2] == pytest.approx((101.5, 1001.5), rel=0.02)
    assert corrected(demo, here, [run(setting, 3.0, 9.0), usual[0]], usual[0]) == pytest.approx((100.0, 1000.0))


def test_the_latest_runs_count(demo: ModelFacts) -> None:
    here = machine()
    setting = make_plan(demo, here, CHAT).setting
    runs = [run(setting, 100.0, 1000.0) for _ in range(9)] + [run(setting, 50.0, 400.0) for _ in range(3)]
    assert corrected(demo, here, runs, runs[0]) == pytest.approx((50.0, 400.0))


def test_prompts_of_about_the_size_count_most(demo: ModelFacts) -> None:
    here = machine()
    setting = make_plan(demo, here, CHAT).setting
    short, long = run(setting, 100.0, 200.0, n_prompt=40), run(setting, 100.0, 900.0, n_prompt=2000)
    few = [*[long] * 5, *[short] * 5]
    assert corrected(demo, here, few, long)[1] == pytest.approx(900.0)
    assert corrected(demo, here, few, short)[1] == pytest.approx(200.0)


@pytest.mark.parametrize(
    ("n_prompt", "n", "prompt_s", "is_corrected"),
    [
        (31, 3, 1e-4, (False, False)),
        (32, 4, 0.01, (True, True)),
        (20, 9, 900.0, (True, False)),  # the computer was busy
        (0, 500, 0.0, (True, False)),
    ],
)
def test_what_is_too_short_teaches_nothing(
    demo: ModelFacts, n_prompt: int, n: int, prompt_s: float, is_corrected: tuple[bool, bool]
) -> None:
    here = machine()
    setting = make_plan(demo, here, CHAT).setting
    assert setting is not None
    one = run(setting, 7.0, 70.0, 100, n)._replace(n_prompt=n_prompt, prompt_s=prompt_s)
    work = Work(setting.kv_type, setting.n_ubatch, setting.threads, setting.repack, setting.load_mode, 512, 2048)
    by = Calibration(demo, here, [one]).correction(work, setting.placement)
    assert (by.decode != 1.0, by.prefill != 1.0) == is_corrected


@pytest.mark.parametrize("times", [0.2, 1.3, 6.0])
@pytest.mark.parametrize("wanted", [CHAT, PlanRequest(one_shot=True), PlanRequest(objective="long-prompt")])
@pytest.mark.parametrize("here", [machine(), machine(28 * GIB, RTX)], ids=["cpu", "gpu"])
def test_one_measured_setting_moves_nothing(qwen: ModelFacts, here: Machine, wanted: PlanRequest, times: float) -> None:
    """However wrong the model is: what was measured is not preferred to what was not, nor shunned."""
    plan = make_plan(qwen, here, wanted)
    history = Calibration(qwen, here, [as_computed(qwen, here, plan.setting, times)])
    again = make_plan(qwen, here, wanted, history)
    assert again.setting == plan.setting
    assert plan.predicted is not None and again.predicted is not None
    assert again.predicted.decode_per_s == pytest.approx(plan.predicted.decode_per_s / times, rel=0.02)
    ratios = [
        new.decode_per_s / old.decode_per_s
        for old, new in zip(
            with_alternatives(qwen, here, wanted, plan).alternatives,
            with_alternatives(qwen, here, wanted, again, history).alternatives,
            strict=True,
        )
    ]
    assert ratios == pytest.approx([1 / times] * len(ratios), rel=0.02)


def test_a_setting_measured_to_be_slow_is_left_for_one_measured_to_be_fast(qwen: ModelFacts) -> None:
    here = machine()
    repacked, mapped = make_plan(qwen, here, CHAT), make_plan(qwen, here, PlanRequest(one_shot=True))
    assert repacked.repack and not mapped.repack
    runs = [as_computed(qwen, here, repacked.setting, 5.0), as_computed(qwen, here, mapped.setting, 1.0)]
    for order in (runs, runs[::-1]):
        plan = make_plan(qwen, here, CHAT, Calibration(qwen, here, order))
        assert not plan.repack and plan.measured is not None
        assert plan.measured.decode_per_s == pytest.approx(runs[1].n_decoded / runs[1].decode_s)


def test_what_was_measured_with_other_settings_is_shown_and_said(qwen: ModelFacts) -> None:
    here = machine()
    mapped = make_plan(qwen, here, PlanRequest(one_shot=True))
    plan = make_plan(qwen, here, CHAT, Calibration(qwen, here, [run(mapped.setting, 5.0, 40.0)]))
    assert plan.repack and plan.measured is not None and plan.measured.decode_per_s == pytest.approx(5.0)
    assert any("1 run with weights not repacked" in reason for reason in plan.reasons)


def test_memory_that_was_not_as_planned_is_told(demo: ModelFacts) -> None:
    here = machine()
    one = run(make_plan(demo, here, CHAT).setting, 9.0, 90.0)
    off = one._replace(differences=(Difference("CPU", 100 << 20, 140 << 20),))

    def told(runs: list[Run]) -> bool:
        reasons = make_plan(demo, here, CHAT, Calibration(demo, here, runs)).reasons
        return any("took 140 MiB on CPU where 100 MiB were planned" in reason for reason in reasons)

    assert told([one, off]) and not told([off, one])


def odd_runs(plan: Plan) -> list[Run]:
    """Runs that can not have been of this model on this machine."""
    setting = plan.setting
    assert setting is not None
    places = setting.placement
    away = replace(places, layers=("CUDA9",) * len(places.layers))
    settings = [
        replace(setting, placement=replace(places, layers=places.layers[1:])),
        replace(setting, placement=away),
        replace(setting, n_ubatch=0),
        replace(setting, n_ctx=0),
        replace(setting, kv_type=cast(Any, "q9_9")),
    ]
    return [run(one, 9.0, 90.0) for one in settings]


def test_runs_of_devices_that_are_gone_do_not_count(demo: ModelFacts) -> None:
    here = machine()
    plan = make_plan(demo, here, CHAT)
    history = Calibration(demo, here, odd_runs(plan))
    assert not history and make_plan(demo, here, CHAT, history) == plan


def test_the_middle_of_two_is_the_faster() -> None:
    assert (median([3.0]), median([9.0, 1.0]), median([5.0, 1.0, 9.0])) == (3.0, 1.0, 5.0)
