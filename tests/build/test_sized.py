"""Files made within a size, and for a machine. The demo is quantized already: good enough to choose and to count."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelocal.build import loss, sized
from moelocal.build.quantize import QuantizeJob, preview, quantize
from moelocal.errors import BadRequest, OutOfMemory
from moelocal.machine.described import parse_machine
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import read_header
from moelocal.plan.request import PlanRequest
from tests.conftest import DEMO


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> QuantizeJob:
    return QuantizeJob(DEMO, tmp_path_factory.mktemp("sized") / "out.gguf", "Q4_K_M", requantize=True, replace=True)


@pytest.fixture(scope="module")
def survey(job: QuantizeJob) -> sized.Survey:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_N_VALUES", 1 << 12)
        return sized.surveyed(job, threads=2)


def test_no_file_is_larger_than_asked_nor_much_smaller(job: QuantizeJob, survey: sized.Survey) -> None:
    for size in (survey.least_bytes, 6_000_000, 8_000_001, survey.most_bytes):
        planned = preview(sized.with_types(job, sized.chosen(survey, size)))
        assert 0.985 * size < planned.file_bytes <= size
    assert planned.bits_per_weight > 8
    result = quantize(sized.with_types(job, sized.chosen(survey, 7_000_000)))
    assert 6_900_000 < result.outputs[0].stat().st_size <= 7_000_000


def test_always_active_weights_get_more_bits(survey: sized.Survey) -> None:
    types = sized.chosen(survey, 7_000_000)
    facts = sized.facts_of(survey, types)
    bits = [8 * layer.attention_bytes / (3 * 256 * 256) for layer in facts.layers]
    experts = [8 * layer.routed_expert_bytes / (3 * 16 * 256 * 256) for layer in facts.layers]
    assert min(bits) > max(experts) / 2
    assert sum(bits) > sum(experts)


def test_types_that_were_asked_for_stay(job: QuantizeJob) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_N_VALUES", 1 << 10)
        fixed = QuantizeJob(DEMO, job.output, "Q4_K_M", patterns=(("ffn_down_exps", "Q6_K"),), requantize=True)
        survey = sized.surveyed(fixed, threads=2)
    made = preview(sized.with_types(fixed, sized.chosen(survey, 8_000_000)))
    assert {GGML_TYPES[c.after].name for c in made.changes if "ffn_down_exps" in c.name} == {"Q6_K"}
    assert made.file_bytes <= 8_000_000


def test_too_small_a_budget_says_the_least(survey: sized.Survey) -> None:
    with pytest.raises(BadRequest, match=r"1\.0 MiB is too little: the smallest file") as caught:
        sized.chosen(survey, 1 << 20)
    size = int(caught.value.hint.split("MiB")[0].split()[-1]) << 20
    sized.chosen(survey, size)


def test_fitting_follows_the_memory(survey: sized.Survey) -> None:
    machine = parse_machine("ram=16GiB:40GB/s;cores=4")
    most, why = sized.fitting(survey, machine, PlanRequest())
    assert most == survey.most_bytes
    assert "RAM" in why
    sizes = [
        sized.fitting(survey, machine, PlanRequest(n_ctx=512, ram_bytes=(256 + mib) << 20))[0]
        for mib in (12, 14, 18, 30)
    ]
    assert sizes == sorted(set(sizes))
    with pytest.raises(OutOfMemory):
        sized.fitting(survey, machine, PlanRequest(ram_bytes=257 << 20))
    with pytest.raises(OutOfMemory, match=r"4,096 tokens of context .* 257 MiB of RAM cannot hold"):
        sized.fitting(survey, machine, PlanRequest(n_ctx=4096, ram_bytes=257 << 20))


def test_a_gpu_holds_it_whole_or_the_experts_go_to_the_ram(survey: sized.Survey) -> None:
    machine = parse_machine("gpu=RTX 4070:12GiB:504GB/s;ram=16GiB:40GB/s;cores=4")

    def fit(mib: int) -> tuple[int, str]:
        return sized.fitting(survey, machine, PlanRequest(n_ctx=512, gpu_bytes=((None, mib << 20),)))

    size, why = fit(8)
    assert "experts in RAM" in why
    assert 8 * size / survey.n_values == pytest.approx(5, abs=0.01)
    assert survey.least_bytes < fit(12)[0] < fit(14)[0] < survey.most_bytes == fit(30)[0]
    assert "holds whole" in fit(12)[1]


def test_what_is_in_ram_gets_types_the_cpu_is_fast_at(survey: sized.Survey) -> None:
    machine, request = parse_machine("ram=16GiB:200GB/s;cores=2"), PlanRequest()
    types = sized.chosen(survey, 9_000_000)
    costs = sized.seconds_in_ram(survey, machine, types, request)
    faster = sized.chosen(survey, 9_000_000, costs)
    assert sum(costs.get(pair, 0) for pair in faster.items()) < sum(costs.get(pair, 0) for pair in types.items())
    gpu = parse_machine("gpu=RTX 4070:12GiB:504GB/s;ram=16GiB:40GB/s;cores=4")
    assert sized.seconds_in_ram(survey, gpu, types, request) == {}


def test_facts_are_those_of_the_file(job: QuantizeJob, survey: sized.Survey, tmp_path: Path) -> None:
    types = sized.chosen(survey, 7_500_000)
    result = quantize(sized.with_types(job, types))
    made = read_header(result.outputs[0])
    assert {t.name: t.ggml_type for t in made.tensors if t.name in types} == types
