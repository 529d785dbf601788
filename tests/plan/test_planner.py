"""The planner's rules, one by one; the worked example of the design."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest

from moelocal.errors import BadRequest, OutOfMemory
from moelocal.machine.speeds import DeviceSpeeds, TypeSpeed
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.model.header import read_header
from moelocal.plan.alternatives import with_alternatives
from moelocal.plan.cost import Placement, Setting, predict
from moelocal.plan.memory import CPU, PROGRAM_BYTES
from moelocal.plan.planner import Plan, PlanRequest, make_plan
from moelocal.plan.request import parse_gpu_memory
from tests.conftest import DEMO
from tests.model.geometries import deepseek_v2_lite, qwen3_30b_a3b
from tests.plan.models import GIB, MIB, Shape, gpu, machine, make_facts


@pytest.fixture(scope="module")
def demo() -> ModelFacts:
    return read_facts(read_header(DEMO))


@pytest.fixture(scope="module")
def qwen() -> ModelFacts:
    return read_facts(qwen3_30b_a3b().header)


RTX = gpu(12 * 10**9)


def on(plan: Plan, facts: ModelFacts, name: str) -> list[int]:
    return plan.expert_layers(facts).get(name, [])


def decode(plan: Plan) -> float:
    assert plan.predicted is not None
    return plan.predicted.decode_per_s


def test_the_worked_example(qwen: ModelFacts) -> None:
    here = machine(28 * GIB, RTX, gpu_per_s=504e9)
    plan = make_plan(qwen, here, PlanRequest(n_ctx=16384, kv_type="f16", n_ubatch=512))
    assert 22 <= len(on(plan, qwen, "CUDA0")) <= 26
    assert decode(plan) == pytest.approx(50, rel=0.1)
    slow = make_plan(qwen, here, PlanRequest(n_ctx=16384, kv_type="f16", n_ubatch=512, experts_on_cpu=48))
    assert on(slow, qwen, "CUDA0") == [] and decode(slow) == pytest.approx(30, rel=0.1)


def test_what_every_token_uses_is_on_the_gpu_first(qwen: ModelFacts) -> None:
    plan = make_plan(qwen, machine(28 * GIB, gpu(4 * GIB)), PlanRequest())
    assert plan.placement is not None
    assert set(plan.placement.layers) == {"CUDA0"} and plan.placement.output == "CUDA0"
    assert on(plan, qwen, CPU) and not any("ffn_gate_inp" in pattern for pattern, _ in plan.overrides)


def test_leading_dense_layers_are_no_experts() -> None:
    facts = read_facts(deepseek_v2_lite().header)
    plan = make_plan(facts, machine(28 * GIB, gpu(4 * GIB)), PlanRequest())
    assert plan.placement is not None and plan.placement.experts[0] == "CUDA0"
    assert 0 not in on(plan, facts, "CUDA0") + on(plan, facts, CPU)


def test_everything_fits_and_the_context_grows(qwen: ModelFacts) -> None:
    plan = make_plan(qwen, machine(28 * GIB, gpu(24 * GIB)), PlanRequest())
    assert on(plan, qwen, CPU) == [] and plan.n_ctx == 32768 and plan.fits
    assert any("room for more" in reason for reason in plan.reasons)
    assert make_plan(qwen, machine(28 * GIB, gpu(24 * GIB)), PlanRequest(n_ctx=4096)).n_ctx == 4096


def test_two_gpus_share_the_layers(qwen: ModelFacts) -> None:
    plan = make_plan(qwen, machine(28 * GIB, gpu(12 * GIB), gpu(10 * GIB, "CUDA1")), PlanRequest())
    assert plan.placement is not None and set(plan.placement.layers) == {"CUDA0", "CUDA1"}
    used = {use.name: use.total_bytes / use.budget_bytes for use in plan.per_device}
    assert min(used["CUDA0"], used["CUDA1"]) > 0.6
    halves = list(plan.placement.layers)
    assert halves == sorted(halves)  # neighbours stay together, in the order of the devices


def test_two_equal_gpus_hold_equally_much(qwen: ModelFacts) -> None:
    plan = make_plan(qwen, machine(28 * GIB, gpu(12 * GIB), gpu(12 * GIB, "CUDA1")), PlanRequest())
    assert plan.placement is not None
    assert abs(plan.placement.layers.count("CUDA0") - plan.placement.layers.count("CUDA1")) <= 2
    assert plan.n_ctx > 8192


def test_a_gpu_slower_than_the_cpu_is_left_alone(qwen: ModelFacts) -> None:
    slow = machine(28 * GIB, gpu(24 * GIB), gpu_per_s=5e9)
    plan = make_plan(qwen, slow, PlanRequest())
    assert plan.n_gpu_layers == 0 and any("CPU is faster" in reason for reason in plan.reasons)


def test_one_answer_is_not_worth_repacking(qwen: ModelFacts) -> None:
    cpu = machine()
    assert make_plan(qwen, cpu, PlanRequest()).repack
    once = make_plan(qwen, cpu, PlanRequest(one_shot=True))
    assert not once.repack and once.load_mode == "mmap" and once.predicted is not None
    assert any("one answer" in reason for reason in once.reasons)


def test_more_than_ram_is_mapped_and_said(qwen: ModelFacts) -> None:
    plan = make_plan(qwen, machine(12 * GIB), PlanRequest())
    assert not plan.repack and plan.load_mode == "mmap" and not plan.fits and plan.disk_bytes > 6 * GIB
    assert plan.per_device[0].total_bytes <= 12 * GIB and "disk" in plan.reasons[0]
    assert decode(plan) < decode(make_plan(qwen, machine(28 * GIB), PlanRequest())) / 3


def test_quantized_kv_only_where_it_pays(qwen: ModelFacts) -> None:
    assert make_plan(qwen, machine(28 * GIB), PlanRequest()).kv_type == "f16"
    assert make_plan(qwen, machine(28 * GIB, gpu(24 * GIB)), PlanRequest()).kv_type == "f16"
    tight = PlanRequest(objective="long-prompt")
    plan = make_plan(qwen, machine(28 * GIB, RTX), tight)
    plain = make_plan(qwen, machine(28 * GIB, RTX), replace(tight, kv_type="f16"))
    if plan.kv_type == "q8_0":
        assert any("q8_0" in reason for reason in plan.reasons) and decode(plan) > decode(plain)


def test_long_prompts_take_larger_batches(qwen: ModelFacts) -> None:
    plan = make_plan(qwen, machine(28 * GIB, RTX), PlanRequest(objective="long-prompt"))
    assert plan.n_ubatch == 2048 and plan.n_ctx == 32768
    assert any("copied to the GPU" in reason for reason in plan.reasons)


def test_what_the_user_says_holds(demo: ModelFacts, qwen: ModelFacts) -> None:
    plan = make_plan(demo, machine(), PlanRequest(n_ctx=300, kv_type="q8_0", threads=3, n_ubatch=64))
    assert (plan.n_ctx, plan.kv_type, plan.threads, plan.n_ubatch, plan.n_ctx_chosen) == (300, "q8_0", 3, 64, False)
    here = machine(28 * GIB, gpu(24 * GIB))
    assert len(on(make_plan(qwen, here, PlanRequest(experts_on_cpu=7)), qwen, CPU)) == 7
    assert make_plan(qwen, here, PlanRequest(cpu_only=True)).n_gpu_layers == 0
    small = make_plan(qwen, here, PlanRequest(gpu_bytes=parse_gpu_memory(["cuda0=6GiB"]), ram_bytes=20 * GIB))
    assert all(use.total_bytes <= (6 if use.name == "CUDA0" else 20) * GIB for use in small.per_device)


def test_plain_cpu_plans(demo: ModelFacts) -> None:
    plan = make_plan(demo, machine(8 * GIB), PlanRequest())
    assert (plan.n_gpu_layers, plan.threads, plan.n_ctx, plan.repack, plan.n_ctx_chosen) == (0, 8, 2048, True, True)
    assert plan.per_device[0].weights_bytes == demo.total_bytes and plan.as_json(demo)["fits"]
    mapped = make_plan(demo, machine(), PlanRequest(ram_bytes=plan.per_device[0].total_bytes + PROGRAM_BYTES - 5 * MIB))
    assert not mapped.repack and mapped.load_mode == "mmap" and "disk" in " ".join(mapped.reasons)


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(demo: ModelFacts) -> None:
    with pytest.raises(OutOfMemory, match="1,048,576") as caught:
        make_plan(demo, machine(1 * GIB), PlanRequest(n_ctx=1 << 20))
    shorter = int(caught.value.hint.split()[-1].rstrip("."))
    assert make_plan(demo, machine(1 * GIB), PlanRequest(n_ctx=shorter)).n_ctx == shorter
    with pytest.raises(OutOfMemory, match="RAM"):
        make_plan(demo, machine(1 << 20), PlanRequest())


def test_budgets_below_the_minimum_name_it(qwen: ModelFacts) -> None:
    here = machine(28 * GIB, RTX)
    with pytest.raises(OutOfMemory, match="output head") as caught:
        make_plan(qwen, here, PlanRequest(gpu_bytes=((None, 100 * MIB),)))
    assert "--gpu-memory" in caught.value.hint
    with pytest.raises(OutOfMemory, match="experts of only 1"):
        make_plan(qwen, here, PlanRequest(experts_on_cpu=1))


def test_devices_that_are_not_there(qwen: ModelFacts) -> None:
    with pytest.raises(BadRequest, match="CUDA7") as caught:
        make_plan(qwen, machine(28 * GIB, RTX), PlanRequest(gpu_bytes=(("CUDA7", GIB),)))
    assert "CUDA0" in caught.value.hint
    with pytest.raises(BadRequest, match="exclude"):
        make_plan(qwen, machine(28 * GIB, RTX), PlanRequest(gpu_bytes=((None, GIB),), cpu_only=True))


def test_a_cache_type_that_the_model_cannot_have(demo: ModelFacts) -> None:
    odd = replace(demo, head_lengths=(40,))
    with pytest.raises(BadRequest, match="q8_0"):
        make_plan(odd, machine(), PlanRequest(kv_type="q8_0"))


def test_decode_is_bytes_over_bandwidth() -> None:
    """One layer of 100 MiB and 4 experts of 30 MiB, one used, at 1 GiB/s; 200 MiB of output."""
    facts = make_facts(Shape(1, 0, 4, 1, 40, 100, 256, 0, False, False, None))
    even = {("Q4_K", False): TypeSpeed(GIB, 1e15)}
    speeds = DeviceSpeeds(even, even, layer_s=0.25, token_s=0.5, measured=True)
    here = machine()
    here = replace(here, speeds=replace(here.speeds, devices={CPU: speeds}))
    setting = Setting(Placement((CPU,), (CPU,), CPU), 512, "f16", 512, 8, repack=False, load_mode="mmap")
    read = (100 * MIB + 8192 + 30 * MIB + 200 * MIB + 4096) / GIB
    assert 1 / predict(facts, here, setting).decode_per_s == pytest.approx(read + 0.75)
    kv = 1024 * 2 * 256 * 2 / GIB
    assert 1 / predict(facts, here, setting, n_depth=1024).decode_per_s == pytest.approx(read + 0.75 + kv)


def test_missing_ram_is_read_from_disk() -> None:
    facts = make_facts(Shape(8, 0, 64, 8, 128, 4, 256, 0, False, False, None))
    setting = Setting(Placement((CPU,) * 8, (CPU,) * 8, CPU), 512, "f16", 512, 8, repack=False, load_mode="mmap")
    whole = predict(facts, machine(64 * GIB), setting)
    half = predict(facts, machine(2 * GIB, disk_per_s=1e9), setting)
    active = sum(layer.active_expert_bytes for layer in facts.layers)
    missed = 1 / half.decode_per_s - 1 / whole.decode_per_s
    assert 0.3 * active / 1e9 < missed < 0.7 * active / 1e9


def test_json_has_exactly_the_keys_of_the_contract(qwen: ModelFacts) -> None:
    here = machine(28 * GIB, RTX)
    request = PlanRequest()
    document = with_alternatives(qwen, here, request, make_plan(qwen, here, request)).as_json(qwen)
    assert list(document) == [
        "model", "fits", "n_ctx", "kv_type", "n_ubatch", "threads", "repack", "load_mode", "devices", "disk_bytes",
        "expert_layers", "overrides", "llama_args", "predicted", "measured", "reasons", "alternatives",
    ]  # fmt: skip
    sizes = ["name", "kind", "weights_bytes", "kv_bytes", "compute_bytes", "total_bytes", "budget_bytes"]
    assert all(list(device) == sizes for device in document["devices"])
    assert list(document["predicted"]) == ["decode_per_s", "prefill_per_s", "first_token_s"]
    assert document["measured"] is None and document["llama_args"][:2] == ["-dev", "CUDA0"]
    layers: dict[str, Any] = document["expert_layers"]
    assert sorted(chain.from_iterable(layers.values())) == list(range(48))
    assert all(list(one) == ["change", "decode_per_s", "total_bytes"] for one in document["alternatives"])
    assert any("instead of Q4_K_M" in one["change"] for one in document["alternatives"])
    assert any("KV cache q8_0" in one["change"] for one in document["alternatives"])


def test_logits_that_are_kept_take_ram(qwen: ModelFacts) -> None:
    one, many = (
        make_plan(qwen, machine(28 * GIB), PlanRequest(n_ctx=4096, n_ubatch=512, n_outputs=n)) for n in (1, 256)
    )
    budgets = [next(use.budget_bytes for use in plan.per_device if use.name == CPU) for plan in (one, many)]
    assert budgets[0] - budgets[1] == 256 * qwen.n_vocab * 4
