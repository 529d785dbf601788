"""How much the planner works: counted, not timed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from moelocal.model import compute
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.plan.cost import Costs, Placement, Seconds
from moelocal.plan.memory import MemoryUse, Sizes
from moelocal.plan.planner import PlanRequest, make_plan
from tests.model.real_numbers import REAL
from tests.plan.models import GIB, gpu, machine

THREE = [gpu(24 * GIB, "CUDA0", "RTX 4090"), gpu(12 * GIB, "CUDA1", "RTX 4070"), gpu(16 * GIB, "CUDA2", "RTX 3060")]


@pytest.fixture(scope="module")
def qwen_235b() -> ModelFacts:
    return read_facts(REAL["qwen3-235b-a22b"]().header)


def test_94_layers_are_few_kinds(qwen_235b: ModelFacts) -> None:
    assert len(qwen_235b.kinds) == 94 and len(set(qwen_235b.kinds)) <= 4 and qwen_235b.kinds[-1] == 93
    for index, kind in enumerate(qwen_235b.kinds):
        layer, first = qwen_235b.layers[index], qwen_235b.layers[kind]
        assert layer.routed_expert_bytes == first.routed_expert_bytes and layer.caches == first.caches


@pytest.mark.parametrize(("n_gpus", "most"), [(1, 8), (2, 30), (3, 50)])
def test_no_placement_is_weighed_twice_and_not_many_are(
    qwen_235b: ModelFacts, monkeypatch: pytest.MonkeyPatch, n_gpus: int, most: int
) -> None:
    seen: Counter[tuple[int, Placement]] = Counter()
    alive: list[Costs] = []
    total = Costs.total

    def counted(self: Costs, placement: Placement, sizes: Sizes, uses: dict[str, MemoryUse] | None = None) -> Seconds:
        alive.append(self)  # so that no two have the same id
        seen[id(self), placement] += 1
        return total(self, placement, sizes, uses)

    monkeypatch.setattr(Costs, "total", counted)
    make_plan(qwen_235b, machine(160 * GIB, *THREE[:n_gpus]), PlanRequest())
    n_settings = len({costs for costs, _ in seen})
    assert n_settings == 18 and set(seen.values()) == {1}
    assert len(seen) <= most * n_settings


def test_layers_that_repeat_are_replayed_once(qwen_235b: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[int] = []
    layer = compute._layer

    def counted(*args: Any) -> Any:
        replayed.append(args[-1])
        return layer(*args)

    monkeypatch.setattr(compute, "_layer", counted)
    Sizes.of(qwen_235b, 8192, "f16", 512)
    assert len(replayed) < 3 * 10 and replayed.count(93) == 3  # three graphs; the last layer is a case of its own
