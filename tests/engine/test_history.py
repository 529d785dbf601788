"""Runs on disk: what is kept, what is read, two programs at once, and files that are damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moelocal.engine import history
from moelocal.engine.conversation import Delta
from moelocal.engine.history import read_runs, remember
from moelocal.engine.meter import Meter
from moelocal.engine.timings import Timings
from moelocal.machine.hardware import Device, Machine, detect
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header
from moelocal.paths import runs_file
from moelocal.plan.cost import Placement
from moelocal.plan.planner import Plan, PlanRequest, make_plan
from tests.conftest import DEMO

MIB = 1 << 20


@pytest.fixture(scope="module")
def here() -> Machine:
    return detect((Device("CPU", "chip", "cpu", 8 << 30, 8 << 30),), "1.0")


@pytest.fixture(scope="module")
def plan(here: Machine) -> Plan:
    return make_plan(read_facts(read_header(DEMO)), here, PlanRequest())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a model?.gguf"
    path.write_bytes(b"GGUF")
    return path


def meter(model: Path, machine: Machine, plan: Plan, n_generated: int = 101, **changes: Any) -> Meter:
    """A session that has just answered: 100 tokens in the cache before, 60 of prompt read in 2 s, 10 s of answer."""
    timings = replace(Timings(0.5, 160, 100, 2.0, 2.1, n_generated, 10.0), **changes)
    session: Any = SimpleNamespace(plan=plan, n_ctx=plan.n_ctx, timings=timings, allocated=plan.per_device)
    return Meter(model, machine, session)


def test_a_run_comes_back_as_it_was(model: Path, here: Machine, plan: Plan) -> None:
    assert read_runs(model, here) == ()
    remember(meter(model, here, plan))
    remember(meter(model, here, plan, prompt_s=3.0))
    first, second = read_runs(model, here)
    assert first.setting == plan.setting and first.ram_bytes == plan.per_device[-1].budget_bytes
    assert (first.n_prompt, first.prompt_s, first.first_token_s, first.load_s) == (60, 2.0, 2.1, 0.5)
    assert (first.n_decoded, first.decode_s, first.n_depth) == (100, 10.0, 210)
    assert second == first._replace(prompt_s=3.0) and first.differences == ()


def test_parts_and_many_devices_come_back_too(model: Path, here: Machine, plan: Plan) -> None:
    places = Placement(
        ("CPU", "CUDA0", "CUDA0", "RPC0"), ("CPU", "CPU", "CUDA0", "RPC0"), "RPC0", (("blk.1.x", "RPC0"),)
    )
    worker = Device("RPC0", "10.0.0.5:50052", "rpc", 1 << 30, 1 << 30, "RPC")
    machine = replace(here, devices=(*here.devices, worker))
    remember(meter(model, machine, replace(plan, placement=places)))
    assert [run.setting.placement for run in read_runs(model, machine)] == [places]
    other = replace(worker, description="10.0.0.6:50052")
    assert read_runs(model, replace(here, devices=(*here.devices, other))) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_generated": 4, "cached_tokens": 153},
        {"n_generated": 0, "prompt_tokens": 100},
        {"n_generated": 2, "prompt_s": 0},
    ],
)
def test_short_answers_are_not_kept(model: Path, here: Machine, plan: Plan, changes: dict[str, Any]) -> None:
    remember(meter(model, here, plan, **changes))
    assert not runs_file(model).exists()


def test_another_file_or_machine_starts_anew(model: Path, here: Machine, plan: Plan) -> None:
    remember(meter(model, here, plan))
    assert read_runs(model, replace(here, cpu=here.cpu._replace(name="another"))) == ()
    os.utime(model, ns=(1, 1))
    assert read_runs(model, here) == ()
    model.unlink()
    assert read_runs(model, here) == ()


def test_memory_that_was_not_as_planned_is_kept(model: Path, here: Machine, plan: Plan) -> None:
    one = meter(model, here, plan)
    (use,) = plan.per_device
    one.session.allocated = (replace(use, kv_bytes=use.kv_bytes + 9 * MIB),)
    remember(one)
    (run,) = read_runs(model, here)
    assert run.differences == (("CPU", use.total_bytes, use.total_bytes + 9 * MIB),)


def test_only_the_latest_count_and_the_files_stay_small(model: Path, here: Machine, plan: Plan) -> None:
    for n in range(300):
        remember(meter(model, here, plan, prompt_s=1.0 + n))
    assert [run.prompt_s for run in read_runs(model, here)] == [281.0 + n for n in range(20)]
    sizes = [file.stat().st_size for file in runs_file(model).parent.iterdir()]
    assert len(sizes) == 2 and max(sizes) < history._HALF_BYTES + 4096


def _answer_often(model: Path, machine: Machine, plan: Plan, start: int) -> None:
    for n in range(10):
        remember(meter(model, machine, plan, prompt_s=float(start + n)))


def test_two_programs_at_once_lose_nothing(model: Path, here: Machine, plan: Plan) -> None:
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_answer_often, args=(model, here, plan, start)) for start in (100, 200)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    found = sorted(run.prompt_s for run in read_runs(model, here))
    assert found == [*map(float, range(100, 110)), *map(float, range(200, 210))]


def test_a_line_cut_off_costs_only_itself(model: Path, here: Machine, plan: Plan) -> None:
    remember(meter(model, here, plan))
    file = runs_file(model)
    line = file.read_bytes()
    file.write_bytes(line + line[: len(line) // 2])
    remember(meter(model, here, plan, prompt_s=3.0))
    assert [run.prompt_s for run in read_runs(model, here)] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 99), ("decode_s", float("inf")), ("decode_s", -1.0), ("decode_s", "1"), ("n_prompt", 2.5),
        ("n_decoded", -1), ("layers", 3), ("layers", [["CPU", 1 << 60]]), ("parts", [["a"]]), ("file", None),
        ("differences", {"a": 1}), ("threads", None), ("kv_type", 5), ("machine", "another"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_passed_over(
    model: Path, here: Machine, plan: Plan, name: str, value: object
) -> None:
    remember(meter(model, here, plan))
    file = runs_file(model)
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    assert read_runs(model, here) == ()


def test_a_reader_that_holds_the_stream_up_does_not_count(model: Path, here: Machine, plan: Plan) -> None:
    one = meter(model, here, plan)
    after, one.session.timings = one.session.timings, None
    for n, _ in enumerate(one.watch(iter([Delta("answer", "x")] * 50))):
        if n == 7:
            one.away_s += 4.0
    one.session.timings = after
    one.keep()
    one.keep()
    (run,) = read_runs(model, here)
    assert run.decode_s == pytest.approx(6.0, abs=0.5)
    for _ in one.watch(iter([])):
        pass
    assert one.timings is None  # the answer before is not this one's
