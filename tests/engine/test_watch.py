"""Router choices seen through llama.cpp's callback: the demo's beside transformers' own, tiny models' by rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moelocal.engine import llama
from moelocal.engine.nodes import route
from moelocal.engine.session import Session, load
from moelocal.engine.watch import Choices, Watch
from moelocal.errors import MoelocalError
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan
from tests.conftest import DEMO

REFERENCE = Path(__file__).parent.parent / "data/demo_choices.json"
Tiny = Callable[[str], Path]
TEXT = "Once upon a time there was a small wolf who could count to ten, and who did so every night. "
ROUTED = {  # n_used, and what the weights of a token add up to
    "tiny-qwen3moe": (2, 1.0),
    "tiny-gptoss": (2, 1.0),
    "tiny-lfm2moe": (2, 1.0),
    "tiny-deepseek2": (2, 1.5),
    "tiny-deepseek2-fused": (2, 1.5),
    "tiny-deepseek2-groups": (4, 1.5),
    "tiny-llama4": (1, None),
}


def plan(n_ubatch: int) -> Plan:
    return Plan(
        n_ctx=512, kv_type="f16", n_ubatch=n_ubatch, threads=1, n_gpu_layers=0, repack=False, load_mode="mmap",
        n_outputs=n_ubatch,
    )  # fmt: skip


def watched(path: Path, tokens: list[int] | None = None, n_ubatch: int = 64) -> dict[int, Choices]:
    watch = Watch()
    with load([path], read_header(path), plan(n_ubatch), watch=watch) as session:
        ids = tokens or session.tokenize(TEXT * 4)
        assert list(route(session, watch, ids))[-1] == len(ids)
    return watch.take()


def by_token(choices: Choices) -> list[frozenset[int]]:
    n = choices.n_used
    return [frozenset(choices.experts[at : at + n]) for at in range(0, len(choices.experts), n)]


def test_the_demo_chooses_what_transformers_chooses() -> None:
    """The reference ran unquantized weights, where 99.9 % agree (docs/experts.md); the bundled file is quantized."""
    reference = json.loads(REFERENCE.read_text())
    found = watched(DEMO, reference["tokens"])
    assert sorted(found) == [int(layer) for layer in reference["layers"]] == [0, 1, 2, 3]
    n_same = 0
    for layer, choices in found.items():
        theirs = [frozenset(ids) for ids in reference["layers"][str(layer)]]
        same = sum(a == b for a, b in zip(by_token(choices), theirs, strict=True))
        assert same / len(theirs) >= 0.92, (layer, same)
        n_same += same
        for expert in range(16):
            n_ours = sum(expert in chosen for chosen in by_token(choices))
            n_theirs = sum(expert in chosen for chosen in theirs)
            assert abs(n_ours - n_theirs) <= 6, (layer, expert, n_ours, n_theirs)
    assert n_same / (4 * len(reference["tokens"])) >= 0.96


@pytest.mark.parametrize("geometry", ROUTED)
def test_every_way_of_routing(tiny: Tiny, geometry: str) -> None:
    path = tiny(geometry)
    facts = read_facts(read_header(path))
    n_used, total = ROUTED[geometry]
    found = watched(path)
    assert sorted(found) == [layer.index for layer in facts.layers if layer.n_experts]
    assert len({choices.n_tokens for choices in found.values()}) == 1 and found[max(found)].n_tokens > 100
    for choices in found.values():
        assert choices.n_used == n_used and len(choices.weights) == len(choices.experts)
        assert min(choices.experts) >= 0 and max(choices.experts) < facts.n_experts
        assert all(len(chosen) == n_used for chosen in by_token(choices))  # no expert twice
        assert min(choices.weights) > 0
        if total is not None:
            sums = [sum(choices.weights[at : at + n_used]) for at in range(0, len(choices.weights), n_used)]
            assert sums == pytest.approx([total] * len(sums), abs=1e-3)


def test_grouped_routing_stays_in_its_groups(tiny: Tiny) -> None:
    for choices in watched(tiny("tiny-deepseek2-groups")).values():
        assert max(len({expert // 4 for expert in chosen}) for chosen in by_token(choices)) <= 2


@pytest.mark.parametrize("geometry", ["tiny-lfm2moe", "tiny-deepseek2-groups", "tiny-llama4"])
def test_the_size_of_batches_makes_hardly_a_difference(tiny: Tiny, geometry: str) -> None:
    """Kernels round differently for few and for many tokens; a row read from a wrong place would agree by chance."""
    one, other = watched(tiny(geometry), n_ubatch=7), watched(tiny(geometry), n_ubatch=256)
    for layer, choices in one.items():
        pairs = list(zip(by_token(choices), by_token(other[layer]), strict=True))
        assert sum(a == b for a, b in pairs) / len(pairs) >= 0.9


def test_a_dense_model_shows_nothing(tiny: Tiny) -> None:
    assert watched(tiny("tiny-dense")) == {}


def test_without_a_watch_there_is_no_callback(open_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = llama.api().llama_init_from_model

    def init(model: int, params: Any) -> Any:
        seen.append(bool(params.cb_eval))
        return real(model, params)

    monkeypatch.setattr(llama.api(), "llama_init_from_model", init)
    session: Session = open_session(DEMO)
    session.open()
    watched(DEMO, list(range(10, 50)))
    assert seen == [False, True]


def test_a_failure_in_the_callback_is_told_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(Watch, "_take", fails)
    with pytest.raises(MoelocalError, match="could not be read") as caught:
        watched(DEMO, list(range(10, 50)))
    assert caught.value.details == ("ZeroDivisionError: of the test",)


def test_an_unfinished_batch_does_not_count() -> None:
    watch = Watch()
    with load([DEMO], read_header(DEMO), plan(16), watch=watch) as session:
        running = route(session, watch, list(range(10, 58)))
        assert [next(running), next(running)] == [16, 32]
        session._interrupt.set()
        with pytest.raises(KeyboardInterrupt):
            next(running)
    assert {choices.n_tokens for choices in watch.take().values()} == {32}


@pytest.mark.parametrize("geometry", ["tiny-qwen3moe", "tiny-gptoss", "tiny-lfm2moe"])
def test_the_last_layer_of_a_prompt_computes_one_token(tiny: Tiny, geometry: str) -> None:
    """Also where llama.cpp by itself would compute all of them: gpt-oss."""
    path, watch = tiny(geometry), Watch()
    with load([path], read_header(path), replace(plan(64), n_outputs=1), watch=watch) as session:
        watch.begin()
        session.evaluate(session.tokenize(TEXT)[:24])
        watch.commit()
    n_tokens = {layer: choices.n_tokens for layer, choices in watch.take().items()}
    assert n_tokens.pop(max(n_tokens)) == 1 and set(n_tokens.values()) == {24}
