"""`tune`: which of two is faster in noise, what a simulated machine is tuned to, what is kept, and the command."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moelocal.engine.session import Session
from moelocal.machine.described import parse_machine
from moelocal.measure import tune as tuning
from moelocal.measure.duel import duel, ratio_of
from moelocal.measure.tuned import forget_tuned, keep_tuned, with_tuned
from moelocal.model.catalog import entries, facts_of
from moelocal.plan.planner import Plan, make_plan
from moelocal.plan.request import PlanRequest
from tests.conftest import ROOT


def taking(*seconds: float) -> Callable[[], float]:
    return iter(seconds).__next__


@pytest.mark.parametrize(
    ("first", "second", "n_pairs", "verdict"),
    [
        ((1.0,) * 9, (2.0,) * 9, 2, "slower"),  # far apart: two pairs are enough
        ((1.0, 1.01, 1.0) * 3, (0.9, 0.91, 0.9) * 3, 3, "faster"),
        ((1.0,) * 9, (1.001,) * 9, 3, "same"),  # too close to matter
        ((1.0, 1.5, 0.8, 1.4, 1.0, 1.2, 0.7), (1.2, 1.0, 1.1, 0.9, 1.3, 0.8, 1.0), 7, "same"),  # noise
    ],
)
def test_a_duel_ends_when_it_is_settled(
    first: tuple[float, ...], second: tuple[float, ...], n_pairs: int, verdict: str
) -> None:
    ratio = duel(taking(*first), taking(*second), 7)
    assert ratio.n_pairs == n_pairs
    assert ("faster" if ratio.is_faster else "slower" if ratio.is_slower else "same") == verdict


def test_a_duel_takes_turns_and_stops_when_told() -> None:
    order: list[str] = []

    def one(name: str) -> Callable[[], float]:
        def measure() -> float:
            order.append(name)
            return random.Random(len(order)).uniform(0.5, 2)

        return measure

    assert duel(one("a"), one("b"), 4).n_pairs == 4 and "".join(order) == "abbaabba"
    assert duel(one("a"), one("b"), 7, may_go_on=lambda: False).n_pairs == 1
    assert not ratio_of([0.5]).is_faster  # of one pair alone nothing is certain


class Clock:
    """Time that passes only when a simulated model computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


class FakeSession(Session):
    """A model whose speed is a function of its plan, times noise."""

    def __init__(self, plan: Plan, clock: Clock, speed: Callable[[Plan], tuple[float, float]], noise: float) -> None:
        self.plan, self._clock, self._speed, self._noise = plan, clock, speed, noise
        self.cached = []
        self.n_vocab = 100
        clock.now += 2.0  # the load
        self._random = random.Random(str(plan.weights))

    @property
    def n_ctx(self) -> int:
        return self.plan.n_ctx

    def run_as(self, plan: Plan) -> None:
        assert plan.weights == self.plan.weights
        if plan.context != self.plan.context:
            self.cached = []
        self.plan = plan

    def rewind(self, n_tokens: int) -> int:
        del self.cached[n_tokens:]
        return len(self.cached)

    def evaluate(self, tokens: Sequence[int], one_by_one: bool = False) -> None:
        prompt_per_s, decode_per_s = self._speed(self.plan)
        rate = decode_per_s if one_by_one else prompt_per_s
        self._clock.now += len(tokens) / rate * self._random.uniform(1 - self._noise, 1 + self._noise)
        self.cached += tokens
        assert len(self.cached) <= self.n_ctx

    def close(self) -> None:
        pass


MACHINE = parse_machine("ram=32GiB:40GB/s;cores=8")
FACTS = facts_of(next(entry for entry in entries() if entry.name == "olmoe-1b-7b"), "Q4_K_M")


def speeds_by(weights: random.Random) -> Callable[[Plan], tuple[float, float]]:
    """A made-up machine on which every knob matters, in its own way."""
    factor: dict[tuple[str, Any], float] = {}

    def of(name: str, value: Any, spread: float) -> float:
        return factor.setdefault((name, value), weights.uniform(1 - spread, 1 + spread))

    def speed(plan: Plan) -> tuple[float, float]:
        both = of("repack", plan.repack, 0.2) * of("fa", plan.flash_attn, 0.1)
        prompt = 200 * both * of("batch", plan.threads_batch or plan.threads, 0.2) * of("ub", plan.n_ubatch, 0.1)
        return prompt, 30 * both * of("threads", plan.threads, 0.2) * of("kv", plan.kv_type, 0.05)

    return speed


def turn_s(plan: Plan, speed: Callable[[Plan], tuple[float, float]]) -> float:
    prompt, decode = speed(plan)
    return 512 / prompt + 256 / decode


def tuned_on(
    clock: Clock, speed: Callable[[Plan], tuple[float, float]], noise: float, seconds: float
) -> tuple[tuning.Tuner, list[tuning.Step]]:
    tuner = tuning.Tuner(FACTS, MACHINE, PlanRequest(), lambda plan: FakeSession(plan, clock, speed, noise), seconds)
    return tuner, list(tuner.run())


def best_of_grid(speed: Callable[[Plan], tuple[float, float]]) -> float:
    """Seconds of a turn."""
    knobs = {
        "repack": (True, False), "threads": (4, 6, 7, 8), "threads_batch": (4, 6, 7, 8), "n_ubatch": (256, 512),
        "flash_attn": (None, False), "kv_type": ("f16",),
    }  # fmt: skip
    points = (dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values()))
    return min(turn_s(plan_with(**point), speed) for point in points)


def plan_with(**fields: Any) -> Plan:
    return make_plan(FACTS, MACHINE, PlanRequest(n_ctx=8192, **fields))


@pytest.mark.parametrize("seed", range(12))
def test_a_simulated_machine_is_tuned_to_its_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, speed = Clock(), speeds_by(random.Random(seed))
    monkeypatch.setattr(tuning, "time", clock)
    tuner, steps = tuned_on(clock, speed, 0.02, 3600.0)
    outcome = tuner.outcome()
    assert outcome.is_complete and steps
    found = turn_s(plan_with(**outcome.fields), speed)
    assert found <= best_of_grid(speed) * 1.03
    assert found <= turn_s(plan_with(), speed) * 1.001
    assert outcome.gain == pytest.approx(turn_s(plan_with(), speed) / found, rel=0.05)


def test_in_noise_what_looked_faster_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    n_good = n_won_later = 0
    for seed in range(20):
        clock, speed = Clock(), speeds_by(random.Random(seed))
        monkeypatch.setattr(tuning, "time", clock)
        tuner, steps = tuned_on(clock, speed, 0.1, 300.0)
        assert clock.now < 330
        found = turn_s(plan_with(**tuner.outcome().fields), speed)
        assert found <= turn_s(plan_with(), speed) * 1.005
        n_good += found <= best_of_grid(speed) * 1.03
        tried = [step.change for step in steps if step.ratio and step.ratio.n_pairs <= 7]
        assert all(tried.count(change) == 1 for change in tried)
        n_won_later += any(step.is_taken and step.ratio and step.ratio.n_pairs > 7 for step in steps)
    assert n_good >= 18 and n_won_later >= 5


def test_prompts_keep_their_threads_when_answers_get_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(tuning, "time", clock)

    def speed(plan: Plan) -> tuple[float, float]:
        return 25.0 * (plan.threads_batch or plan.threads), 40.0 if plan.threads == 4 else 20.0

    tuner, _ = tuned_on(clock, speed, 0.0, 3600.0)
    assert tuner.best["threads"] == 4 and tuner.best["threads_batch"] == 8


def test_the_time_is_kept_and_what_was_found_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(tuning, "time", clock)

    def speed(plan: Plan) -> tuple[float, float]:
        return (100.0, 30.0) if plan.repack else (150.0, 45.0)

    tuner = tuning.Tuner(
        FACTS,
        MACHINE,
        PlanRequest(repack=None),
        lambda plan: FakeSession(plan, clock, speed, 0.0),
        60.0,
    )
    steps = tuner.run()
    assert next(steps).is_taken and tuner.outcome().fields == {"repack": False} and not tuner.outcome().is_complete
    steps.close()  # as Ctrl-C does
    assert tuner.outcome().fields == {"repack": False}
    assert sum(1 for _ in tuner.run()) < 8 and clock.now < 90


def test_nothing_is_tried_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(tuning, "time", clock)
    asked = PlanRequest(repack=True, threads=4, threads_batch=8, n_ubatch=256, flash_attn=True, kv_type="f16")
    tuner = tuning.Tuner(FACTS, MACHINE, asked, lambda plan: FakeSession(plan, clock, lambda _: (1e3, 1e3), 0), 60)
    assert list(tuner.run()) == [] and tuner.outcome().fields == {}


def test_what_is_kept_fills_only_what_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELOCAL_HOME", str(tmp_path / "home"))
    model = tmp_path / "m.gguf"
    model.write_bytes(b"x")
    fields = {"threads": 3, "repack": False, "experts_on_cpu": 7, "n_ubatch": 256}
    keep_tuned(model, "here", fields, 1.1, "now")
    found = with_tuned(PlanRequest(), model, "here")
    assert (found.threads, found.repack, found.experts_on_cpu, found.n_ubatch) == (3, False, 7, 256)
    assert set(found.tuned) == set(fields) and found.untuned() == PlanRequest()
    assert with_tuned(PlanRequest(threads=1), model, "here").threads == 1
    assert with_tuned(PlanRequest(one_shot=True), model, "here").repack is None
    assert with_tuned(PlanRequest(n_ctx=4096), model, "here").experts_on_cpu is None
    assert with_tuned(PlanRequest(), model, "elsewhere") == PlanRequest()
    model.write_bytes(b"another file")
    assert with_tuned(PlanRequest(), model, "here") == PlanRequest()
    keep_tuned(model, "here", {"threads": "many", "repack": 7, "kv_type": "q9", "seed": 1}, 1.0, "now")
    assert with_tuned(PlanRequest(), model, "here") == PlanRequest()
    next((tmp_path / "home" / "tuned").iterdir()).write_text("{")
    assert with_tuned(PlanRequest(), model, "here") == PlanRequest()
    assert forget_tuned(model) and not forget_tuned(model)


def test_a_plan_falls_back_where_tuned_settings_no_longer_fit() -> None:
    small = parse_machine("ram=6GiB:40GB/s;cores=8")
    tuned = PlanRequest(repack=True, tuned=("repack",))
    roomy, tight = make_plan(FACTS, MACHINE, tuned), make_plan(FACTS, small, replace(tuned, ram_bytes=3 << 30))
    assert roomy.repack and any("moelocal tune" in reason for reason in roomy.reasons)
    assert not tight.repack and not any("moelocal tune" in reason for reason in tight.reasons)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    env = {**os.environ, "MOELOCAL_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}

    def run_(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moelocal", *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)

    return run_


def test_the_command_measures_and_says_what_it_did(run: Run) -> None:
    done = run("tune", "demo", "--minutes", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "demo" and found["steps"] and isinstance(found["kept"], bool)
    assert set(found["settings"]) <= {"threads", "threads_batch", "n_ubatch", "repack", "flash_attn", "kv_type"}
    assert "Traceback" not in done.stderr
    told = run("tune", "demo", "--forget")
    assert told.returncode == 0 and "demo" in told.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("demo", "--minutes", "0"), "0.1 to 1440"),
        (("demo", "--rpc", "127.0.0.1:1"), "this machine alone"),
        (("no-such-model",), "no-such-model"),
        (("demo", "--ram", "1MiB"), "RAM"),
    ],
)
def test_refusals(run: Run, args: tuple[str, ...], text: str) -> None:
    done = run("tune", *args)
    assert done.returncode in (1, 2) and text in done.stderr and "Traceback" not in done.stderr


def test_what_it_refuses_is_not_offered(run: Run) -> None:
    assert "--rpc" not in run("tune", "--help").stdout
