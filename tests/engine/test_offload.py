"""Placements carried out on real devices: RPC servers on this machine hold layers and experts as told."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moelocal.engine.llama import offload_prompts_from
from moelocal.engine.session import load
from moelocal.errors import BadRequest
from moelocal.measure.probe_model import base_model, write_probe_model
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header
from moelocal.model.roles import tensor_role
from moelocal.plan.cost import Placement
from moelocal.plan.llama_flags import offload_min_batch
from moelocal.plan.planner import Plan
from tests.conftest import ROOT
from tests.workers import worker

Tiny = Callable[[str], Path]
GEOMETRIES = ["tiny-qwen3moe", "tiny-gptoss", "tiny-lfm2moe", "tiny-deepseek2", "tiny-deepseek2-fused"]
EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)")


@pytest.fixture(scope="module")
def two_workers() -> Iterator[list[str]]:
    with worker() as (first, _), worker() as (second, _):
        yield [f"127.0.0.1:{first}", f"127.0.0.1:{second}"]


def answers(path: Path, endpoints: list[str], *placements: Placement) -> list[dict[str, Any]]:
    described = [json.dumps(asdict(placement)) for placement in placements]
    command = [sys.executable, "-m", "tests.engine.offload_child", str(path), ",".join(endpoints), *described]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [kind for name, kind in document["kinds"].items() if name != "CPU"] == ["rpc"] * len(endpoints)
    results: list[dict[str, Any]] = document["results"]
    return results


def n_layers(path: Path) -> int:
    return len(read_facts(read_header(path)).layers)


def on_cpu(path: Path) -> Placement:
    n = n_layers(path)
    return Placement(("CPU",) * n, ("CPU",) * n, "CPU")


def same(result: dict[str, Any], expected: dict[str, Any]) -> bool:
    """The same tokens, or logits alike but for rounding: sums in another order, where a random router may flip."""
    alike: bool = statistics.correlation(result["logits"], expected["logits"]) > 0.95
    return result["tokens"] == expected["tokens"] or alike


def expected_bytes(path: Path, placement: Placement) -> dict[str, int]:
    """Weights per device that a placement asks for, from the file's table of tensors."""
    tensors = read_header(path).tensors
    held: dict[str, int] = {}
    for tensor in tensors:
        layer, role = tensor_role(tensor.name)
        if layer is not None:
            home = placement.experts[layer] if role == "routed_expert" else placement.layers[layer]
            home = dict(placement.parts).get(tensor.name, home)
        else:
            home = "CPU" if role == "embedding" else placement.output
        held[home] = held.get(home, 0) + tensor.n_bytes
    if not any(tensor.name == "output.weight" for tensor in tensors) and placement.output != "CPU":
        held[placement.output] += next(t.n_bytes for t in tensors if t.name == "token_embd.weight")
    return held


def check(path: Path, placement: Placement, result: dict[str, Any]) -> None:
    """llama.cpp put the weights and caches where the placement says, and moved experts only."""
    facts = read_facts(read_header(path))
    use = {entry["name"]: entry for entry in result["use"]}
    for name, n_bytes in expected_bytes(path, placement).items():
        assert use[name]["weights_bytes"] == pytest.approx(n_bytes, rel=0.02, abs=20_000), name
    for name in use:
        here = [layer for layer, home in zip(facts.layers, placement.layers, strict=True) if home == name]
        kv = sum(layer.kv_bytes(512, "f16", 64) for layer in here)
        assert use[name]["kv_bytes"] == pytest.approx(kv, rel=0.02, abs=20_000), name
    assert {use[name]["kind"] for name in use if name != "CPU"} <= {"rpc"}
    for tensor in result["moved"]:
        found = EXPERT.fullmatch(tensor)
        assert found or (tensor.startswith(("output", "token_embd")) and placement.output == "CPU"), (
            f"{tensor} was moved"
        )
    wanted = {
        tensor.name
        for tensor in read_header(path).tensors
        if tensor_role(tensor.name)[1] == "routed_expert"
        and placement.experts[tensor_role(tensor.name)[0] or 0] != placement.layers[tensor_role(tensor.name)[0] or 0]
    } | {name for name, _ in placement.parts}
    assert {tensor for tensor in result["moved"] if tensor.startswith("blk.")} == wanted


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_one_device(geometry: str, tiny: Tiny, two_workers: list[str]) -> None:
    """All on the device but the experts of some layers; then only the last layers on it, their experts in RAM."""
    path = tiny(geometry)
    n = n_layers(path)
    is_moe = [layer.n_experts > 0 for layer in read_facts(read_header(path)).layers]
    most = ("RPC0",) * n
    half = ("CPU",) * (n // 2) + ("RPC0",) * (n - n // 2)
    placements = [
        Placement(most, most, "RPC0"),
        Placement(most, tuple("CPU" if moe and i % 2 else "RPC0" for i, moe in enumerate(is_moe)), "RPC0"),
        Placement(half, tuple("CPU" if moe else home for moe, home in zip(is_moe, half, strict=True)), "RPC0"),
    ]
    expected, *results = answers(path, two_workers[:1], on_cpu(path), *placements)
    assert expected["use"][0]["name"] == "CPU" and len(expected["use"]) == 1
    for placement, result in zip(placements, results, strict=True):
        check(path, placement, result)
        assert same(result, expected), placement


@pytest.mark.parametrize("geometry", ["tiny-qwen3moe", "tiny-gptoss", "tiny-deepseek2"])
def test_two_devices_and_ram(geometry: str, tiny: Tiny, two_workers: list[str]) -> None:
    path = tiny(geometry)
    placements = [
        Placement(("RPC0", "RPC1", "RPC1", "RPC1"), ("RPC0", "RPC1", "CPU", "CPU"), "RPC1"),
        Placement(("CPU", "RPC1", "RPC1", "RPC0"), ("CPU", "CPU", "RPC0", "RPC0"), "RPC0"),
    ]
    expected, *results = answers(path, two_workers, on_cpu(path), *placements)
    for placement, result in zip(placements, results, strict=True):
        check(path, placement, result)
        assert same(result, expected), placement


@pytest.mark.parametrize("geometry", ["tiny-qwen3moe", "tiny-lfm2moe"])
def test_odd_placements(geometry: str, tiny: Tiny, two_workers: list[str]) -> None:
    """Single tensors in RAM; the output (which may be the embedding) in RAM; experts elsewhere than their CPU layer."""
    path = tiny(geometry)
    n = n_layers(path)
    on_device, in_ram = ("RPC0",) * n, ("CPU",) * n
    parts = tuple((f"blk.{n - 1}.ffn_{part}_exps.weight", "CPU") for part in ("down", "gate"))
    placements = [
        Placement(on_device, on_device, "RPC0", parts),
        Placement(on_device, on_device, "CPU"),
        Placement(in_ram, (*in_ram[: n - 2], "RPC0", "RPC0"), "CPU"),
        Placement(in_ram, in_ram, "RPC0"),
    ]
    expected, *results = answers(path, two_workers[:1], on_cpu(path), *placements)
    for placement, result in zip(placements, results, strict=True):
        check(path, placement, result)
        assert same(result, expected), placement


def test_prompts_are_offloaded_by_experts(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    monkeypatch.delenv("GGML_OP_OFFLOAD_MIN_BATCH", raising=False)
    offload_prompts_from(offload_min_batch(read_facts(read_header(tiny("tiny-dense")))))
    assert "GGML_OP_OFFLOAD_MIN_BATCH" not in os.environ
    offload_prompts_from(offload_min_batch(read_facts(read_header(tiny("tiny-qwen3moe")))))
    assert os.environ["GGML_OP_OFFLOAD_MIN_BATCH"] == "160"  # 32 x 10 experts / 2 used
    offload_prompts_from(64)
    assert os.environ["GGML_OP_OFFLOAD_MIN_BATCH"] == "160", "what the user set stays"


def test_a_device_that_is_not_there(tiny: Tiny) -> None:
    path = tiny("tiny-dense")
    elsewhere = ("CUDA7",) * 4
    plan = Plan(
        n_ctx=64, kv_type="f16", n_ubatch=64, threads=1, n_gpu_layers=0, repack=True, load_mode="mmap",
        placement=Placement(elsewhere, elsewhere, "CUDA7"),
    )  # fmt: skip
    with pytest.raises(BadRequest, match="CUDA7") as caught:
        load([path], read_header(path), plan)
    assert "CPU" in caught.value.hint


@pytest.mark.slow
def test_the_predicted_order_of_placements_is_the_measured_one(tmp_path: Path) -> None:
    """24 layers of hardly any weights: what differs is how often a token changes the device, so that the order does not
    hang on how busy this machine is. Everything on the worker; a third of the layers' experts here; all of them."""
    model = tmp_path / "model.gguf"
    write_probe_model(base_model(True, 24), model)
    with worker() as (port, _):
        command = [sys.executable, "-m", "tests.engine.order_child", str(model), f"127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    assert len(found) == 3
    by_prediction, by_measurement = (
        sorted(found, key=lambda name: found[name][which]) for which in ("predicted", "measured")
    )
    assert by_prediction == by_measurement, found
