"""llama.cpp asked what a plan takes, without weights: against our own arithmetic, with all layers here and on RPC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moelocal.engine.exact import exact_memory
from moelocal.errors import LoadFailed
from moelocal.model.compute import Where, Work, compute_bytes
from moelocal.model.facts import ModelFacts, kv_bytes, read_facts
from moelocal.plan.cost import Placement
from moelocal.plan.planner import Plan
from tests.model.architectures import write_gguf
from tests.model.real_numbers import REAL
from tests.workers import worker

N_CTX = 16384
PLACED = [
    "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite", "deepseek-v2", "glm-4.5-air", "lfm2-8b-a1b",
    "gemma-4-26b-a4b", "granite-4-h-small", "llama-4-scout", "qwen3-next-80b-a3b", "ling-mini-2.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with worker() as (port, _):
        yield f"127.0.0.1:{port}"


def sparse(name: str, folder: Path) -> Path:
    real, path = REAL[name](), folder / f"{name}.gguf"
    write_gguf(path, real.arch, real.keys, real.header.tensors)
    return path


def row(facts: ModelFacts) -> int:
    """Bytes of one token's logits: llama.cpp's log counts them with the CPU's buffer."""
    return facts.graph.n_vocab * 4


def plan_for(placement: Placement | None) -> Plan:
    return Plan(
        n_ctx=N_CTX, kv_type="f16", n_ubatch=512, threads=1, n_gpu_layers=0, repack=False, load_mode="mmap",
        placement=placement,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b", "qwen3-next-80b-a3b"])
def test_everything_on_the_cpu(name: str, tmp_path: Path) -> None:
    facts = read_facts(REAL[name]().header)
    found = exact_memory([sparse(name, tmp_path)], plan_for(None))
    assert list(found) == ["CPU"] and found["CPU"].kv_bytes == kv_bytes(facts, N_CTX)
    estimate = compute_bytes(facts, Work(N_CTX), Where.all_on("CPU", len(facts.layers)))["CPU"]
    assert estimate + row(facts) == pytest.approx(found["CPU"].compute_bytes, rel=0.005)


@pytest.mark.parametrize("name", PLACED)
def test_layers_on_a_device_and_experts_apart(name: str, endpoint: str, tmp_path: Path) -> None:
    facts, path = read_facts(REAL[name]().header), sparse(name, tmp_path)
    n = len(facts.layers)
    here, there = ("CPU",) * n, ("RPC0",) * n
    half = ("RPC0",) * (n // 2) + ("CPU",) * (n - n // 2)
    for layers, experts in ((there, there), (there, half), (there, here), (half[::-1], half[::-1])):
        found = exact_memory([path], plan_for(Placement(layers, experts, "RPC0")), [endpoint])
        estimate = compute_bytes(facts, Work(N_CTX), Where(layers, experts, "RPC0"))
        cached = sum(layer.kv_bytes(N_CTX) for layer, home in zip(facts.layers, layers, strict=True) if home == "RPC0")
        assert (found["RPC0"].kv_bytes, found["CPU"].kv_bytes) == (cached, kv_bytes(facts, N_CTX) - cached)
        assert estimate["RPC0"] == pytest.approx(found["RPC0"].compute_bytes, rel=0.005)
        assert estimate["CPU"] + row(facts) == pytest.approx(found["CPU"].compute_bytes, rel=0.005)


def test_a_file_that_llama_cpp_refuses(tmp_path: Path) -> None:
    real, path = REAL["olmoe-1b-7b"](), tmp_path / "broken.gguf"
    write_gguf(path, real.arch, real.keys, real.header.tensors[:-1])
    with pytest.raises(LoadFailed, match=r"cannot size broken\.gguf"):
        exact_memory([path], plan_for(None))
