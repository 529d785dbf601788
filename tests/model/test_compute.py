"""Compute buffers: what must hold for every model, whatever llama.cpp says."""

from __future__ import annotations

import pytest

from moelocal.model import compute
from moelocal.model.compute import Where, Work, compute_bytes
from moelocal.model.facts import read_facts
from moelocal.model.header import GGUFHeader, TensorInfo
from tests.model.real_numbers import REAL


@pytest.mark.parametrize("name", REAL)
def test_more_tokens_and_more_context_never_take_less(name: str) -> None:
    facts = read_facts(REAL[name]().header)
    where = Where.all_on("CPU", len(facts.layers))
    sizes = [compute_bytes(facts, Work(n), where)["CPU"] for n in (1024, 4096, 65536)]
    assert sizes == sorted(sizes)
    sizes = [compute_bytes(facts, Work(4096, n_ubatch=n), where)["CPU"] for n in (64, 512, 2048)]
    assert sizes == sorted(sizes)


def test_devices_of_a_placement_and_no_other() -> None:
    facts = read_facts(REAL["qwen3-30b-a3b"]().header)
    n = len(facts.layers)
    split = Where(("GPU0",) * 20 + ("GPU1",) * (n - 20), ("CPU",) * n, "GPU1")
    sizes = compute_bytes(facts, Work(8192), split)
    assert set(sizes) == {"CPU", "GPU0", "GPU1"} and min(sizes.values()) > 8 << 20
    alone = compute_bytes(facts, Work(8192), Where.all_on("GPU0", n))
    assert set(alone) == {"CPU", "GPU0"}
    assert alone["CPU"] < sizes["CPU"] < alone["GPU0"] + alone["CPU"]  # the experts' part moved to the CPU


@pytest.mark.parametrize(
    ("name", "half_of_the_layers_mib", "experts_in_ram_mib"),
    [
        ("granite-4-h-small", 175.02, 192.03),  # masks that arrive in the middle; convolutions' pasts, gathered ahead
        ("granite-4-h-tiny", 67.01, 60.56),
        ("gemma-4-26b-a4b", 113.52, 80.51),
        ("llama-4-scout", 112.52, 112.52),
    ],
)
def test_a_devices_buffer_is_what_llama_cpp_takes(
    name: str, half_of_the_layers_mib: float, experts_in_ram_mib: float
) -> None:
    facts = read_facts(REAL[name]().header)
    n = len(facts.layers)
    here, there = ("CPU",) * n, ("GPU0",) * n
    half = ("CPU",) * (n - n // 2) + ("GPU0",) * (n // 2)
    sizes = compute_bytes(facts, Work(16384), Where(half, half, "GPU0"))
    assert sizes["GPU0"] / (1 << 20) == pytest.approx(half_of_the_layers_mib, abs=0.01)
    sizes = compute_bytes(facts, Work(16384), Where(there, here, "GPU0"))
    assert sizes["GPU0"] / (1 << 20) == pytest.approx(experts_in_ram_mib, abs=0.01)


def test_no_more_tokens_than_the_context_holds() -> None:
    facts = read_facts(REAL["olmoe-1b-7b"]().header)
    where = Where.all_on("CPU", len(facts.layers))
    assert compute_bytes(facts, Work(256, n_ubatch=2048), where) == compute_bytes(facts, Work(256, n_ubatch=256), where)


def test_shapes_that_make_no_sense_break_nothing() -> None:
    header = REAL["granite-4-h-tiny"]().header
    flat = tuple(TensorInfo(t.name, t.shape[:1], t.ggml_type, 0, t.n_bytes) for t in header.tensors)
    whole = ("token_embd", "_exps")
    kept = (t if any(n in t.name for n in whole) else f for t, f in zip(header.tensors, flat, strict=True))
    facts = read_facts(GGUFHeader(header.metadata, tuple(kept), 0))
    assert compute_bytes(facts, Work(4096), Where.all_on("CPU", len(facts.layers)))["CPU"] > 0


@pytest.mark.parametrize(
    "name",
    ["qwen3-235b-a22b", "gpt-oss-20b", "qwen3-next-80b-a3b", "granite-4-h-tiny", "glm-4.5", "gemma-4-26b-a4b",
     "llama-4-scout", "lfm2-8b-a1b"],
)  # fmt: skip
def test_skipping_layers_that_repeat_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_facts(REAL[name]().header)
    n = len(facts.layers)
    homes = ("CPU",) * (n // 5) + ("A",) * (n - n // 5 - n // 3) + ("B",) * (n // 3)
    away = tuple("CPU" if i % 7 < 4 or i > n // 2 else home for i, home in enumerate(homes))
    places = [
        Where.all_on("A", n),
        Where(("A",) * n, ("CPU",) * n, "A"),
        Where(homes, homes, "B"),
        Where(homes, away, "B"),
    ]
    short = [compute_bytes(facts, Work(n_ctx=4096), where) for where in places]
    monkeypatch.setattr(compute, "_repeated", lambda *_: 0)
    assert short == [compute_bytes(facts, Work(n_ctx=4096), where) for where in places]
