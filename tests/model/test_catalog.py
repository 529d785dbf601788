from __future__ import annotations

import math
import re
from importlib import resources

import pytest

from moelocal.errors import BadRequest
from moelocal.machine.described import parse_machine
from moelocal.model.catalog import Entry, closest, entries, facts_of, find
from moelocal.model.compute import Where, Work, compute_bytes
from moelocal.model.facts import kv_bytes, read_facts
from moelocal.plan.planner import make_plan
from moelocal.plan.request import PlanRequest
from tests.model.real_numbers import REAL

ENTRIES = [pytest.param(entry, id=entry.name) for entry in entries()]
DESKTOP = parse_machine("gpu=RTX 4070:12GiB:504GB/s;ram=32GiB:60GB/s;disk=3GB/s;cores=8")
LAPTOP = parse_machine("ram=16GiB:40GB/s;disk=2GB/s;cores=4")

# catalog -> headers that llama.cpp accepts (test_facts_engine.py), where both are in the same mix of types
SAME = {
    "granite-3.1-1b-a400m": "granite-1b-a400m",
    "smallthinker-4b-a0.6b": "smallthinker-4b-a0.6b",
    "granite-4.0-h-tiny": "granite-4-h-tiny",
    "lfm2-8b-a1b": "lfm2-8b-a1b",
    "ling-mini-2.0": "ling-mini-2.0",
    "smallthinker-21b-a3b": "smallthinker-21b-a3b",
    "ernie-4.5-21b-a3b": "ernie-4.5-21b-a3b",
    "gemma-4-26b-a4b": "gemma-4-26b-a4b",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "granite-4.0-h-small": "granite-4-h-small",
    "phi-3.5-moe": "phi-3.5-moe",
    "qwen2-57b-a14b": "qwen2-57b-a14b",
    "hunyuan-a13b": "hunyuan-a13b",
    "ling-flash-2.0": "ling-flash-2.0",
    "gpt-oss-120b": "gpt-oss-120b",
    "dbrx": "dbrx",
    "mixtral-8x22b": "mixtral-8x22b",
    "dots.llm1": "dots1",
    "minimax-m2.5": "minimax-m2",
    "qwen3-235b-a22b": "qwen3-235b-a22b",
    "glm-4.6": "glm-4.5",
    "llama-4-maverick": "llama-4-maverick",
    "qwen3-coder-480b-a35b": "qwen3-coder-480b-a35b",
    "deepseek-v3.1": "deepseek-v3",
    "kimi-k2": "kimi-k2",
}
# bytes of the file on the hub
PUBLISHED = {
    "olmoe-1b-7b": 4.21e9,
    "granite-4.0-h-tiny": 4.23e9,
    "lfm2.5-8b-a1b": 5.16e9,
    "qwen3-30b-a3b": 18.55e9,
    "qwen3-next-80b-a3b": 48.5e9,
    "gpt-oss-120b": 63.39e9,
}


def test_there_are_enough_and_they_are_sorted() -> None:
    totals = [entry.total_params for entry in entries()]
    assert len(totals) >= 30
    assert totals == sorted(totals)


def test_every_entry_has_its_evidence() -> None:
    text = resources.files("moelocal").joinpath("model/catalog.toml").read_text(encoding="utf-8")
    for block in text.split("[[model]]")[1:]:
        name = re.search(r'name = "(.*)"', block)
        assert name and re.match(r"\n# Seen: \S+", block), name


def test_names_are_unique_and_easy_to_type() -> None:
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in names)
    assert "demo" not in names


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_says_what_it_is(entry: Entry) -> None:
    for repo in (entry.repo, entry.source):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", repo)
    assert entry.repo.lower().endswith("gguf")
    assert entry.title and entry.licence and entry.arch
    assert entry.n_ctx >= 4096
    assert 10 < len(entry.good_at) < 120 and not entry.good_at.endswith(".")
    assert entry.active_params < entry.total_params


@pytest.mark.parametrize("entry", ENTRIES)
def test_geometry_gives_the_parameters_of_the_card(entry: Entry) -> None:
    facts, card = facts_of(entry), entry.active_params
    assert facts.total_params == pytest.approx(entry.total_params, rel=0.02)
    table = facts.n_vocab * entry.geometry.n_embd
    other = facts.active_params - table if entry.geometry.is_tied else facts.active_params + table
    counts = (facts.active_params, other)  # some cards count the embedding, some do not
    is_cut = card % 10**9 == 0 and any(count // 10**9 * 10**9 == card for count in counts)  # 3.6 is "A3B" on some cards
    assert is_cut or any(math.isclose(count, card, rel_tol=0.1) for count in counts)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_can_be_planned(entry: Entry) -> None:
    facts = facts_of(entry)
    assert facts.is_moe
    assert (facts.arch, facts.name, facts.n_ctx_train) == (entry.arch, entry.title, entry.n_ctx)
    plan = make_plan(facts, DESKTOP, PlanRequest())
    assert plan.predicted is not None and plan.predicted.decode_per_s > 0
    assert (plan.disk_bytes > 0) == (facts.total_bytes > 40e9)  # 12 GiB and what is free of 32 GiB


def test_a_small_machine_runs_the_small_ones() -> None:
    small = find("olmoe-1b-7b")
    assert small
    plan = make_plan(facts_of(small), LAPTOP, PlanRequest())
    assert plan.fits and plan.predicted and plan.predicted.decode_per_s > 10


@pytest.mark.parametrize(("name", "real"), SAME.items())
def test_facts_are_those_of_a_header_that_llama_cpp_accepts(name: str, real: str) -> None:
    entry = find(name)
    assert entry
    facts, truth = facts_of(entry), read_facts(REAL[real]().header)
    assert (facts.arch, facts.quant) == (truth.arch, truth.quant)
    assert facts.total_bytes == pytest.approx(truth.total_bytes, rel=0.003)
    assert facts.active_bytes_per_token == pytest.approx(truth.active_bytes_per_token, rel=0.01)
    assert [layer.n_experts for layer in facts.layers] == [layer.n_experts for layer in truth.layers]
    assert kv_bytes(facts, 8192) == kv_bytes(truth, 8192)
    assert facts.head_lengths == truth.head_lengths
    everywhere = Where.all_on("CPU", len(facts.layers))
    work = compute_bytes(facts, Work(8192), everywhere)["CPU"]
    assert work == pytest.approx(compute_bytes(truth, Work(8192), everywhere)["CPU"], rel=0.05)


@pytest.mark.parametrize(("name", "n_bytes"), PUBLISHED.items())
def test_files_are_as_large_as_predicted(name: str, n_bytes: float) -> None:
    entry = find(name)
    assert entry
    assert facts_of(entry).file_bytes == pytest.approx(n_bytes, rel=0.005)


def test_a_quantization_says_how_large() -> None:
    entry = find("qwen3-30b-a3b")
    assert entry
    names = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16")
    facts = [facts_of(entry, name.lower()) for name in names]
    assert [one.quant for one in facts] == list(names)
    assert [one.total_bytes for one in facts] == sorted(one.total_bytes for one in facts)
    with pytest.raises(BadRequest, match="UD-Q4_K_XL"):
        facts_of(entry, "UD-Q4_K_XL")


def test_gpt_oss_stays_in_its_own_type() -> None:
    entry = find("gpt-oss-20b")
    assert entry
    assert facts_of(entry, "Q8_0") == facts_of(entry)
    assert facts_of(entry).quant == "MXFP4"


def test_names_are_found_as_people_write_them() -> None:
    assert find("Qwen3-30B-A3B ") is find("qwen3-30b-a3b") is not None
    assert find("qwen3") is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("qwen3-30b-a3", "qwen3-30b-a3b"),
        ("qwen-30b-a3b", "qwen3-30b-a3b"),
        ("gptoss-20b", "gpt-oss-20b"),
        ("gpt-oss", "gpt-oss-20b"),
        ("mixtral-8x7", "mixtral-8x7b"),
        ("DeepSeek-V3", "deepseek-v3.1"),
        ("flash", "glm-4.7-flash"),
    ],
)
def test_typos_lead_to_names(typed: str, meant: str) -> None:
    assert meant in closest(typed)


@pytest.mark.parametrize("typed", ["", "xyzzy", "x"])
def test_nonsense_leads_nowhere(typed: str) -> None:
    assert closest(typed) == []
