"""Weights, KV cache and compute buffers of real models against llama.cpp's own figures, from files without weights."""

import sys
from collections.abc import Mapping
from functools import cache

import pytest

from moelocal.model.compute import Where, Work, compute_bytes
from moelocal.model.facts import ModelFacts, kv_bytes, read_facts
from moelocal.model.kv import KVType
from tests.model.architectures import Answer, Context, ask_engine
from tests.model.real_numbers import REAL

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the engine's children are forked")

MIB = 1 << 20
ROUNDING = 0.0051  # of each figure in the log, MiB
KV_TYPES: tuple[KVType, ...] = ("f16", "q8_0")
WORK = [Work(n_ctx, kv_type) for n_ctx in (4096, 16384, 65536) for kv_type in KV_TYPES]
WORK += [Work(16384, n_ubatch=2048), Work(4096, n_ubatch=128)]


@cache
def model(name: str) -> ModelFacts:
    return read_facts(REAL[name]().header)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Answer]:
    built = {name: build() for name, build in REAL.items()}
    contexts = [Context(work.n_ctx, work.n_ubatch, work.kv_type) for work in WORK]
    tensors = {name: real.header.tensors for name, real in built.items()}
    keys = {name: (real.arch, real.keys) for name, real in built.items()}
    return ask_engine(keys, contexts, tmp_path_factory.mktemp("exact"), tensors)


def test_there_are_enough_of_them() -> None:
    assert len(REAL) >= 30
    assert len({REAL[name]().arch for name in REAL}) >= 20


@pytest.mark.parametrize("name", REAL)
def test_weights_to_the_byte(engine: Mapping[str, Answer], name: str) -> None:
    facts = model(name)
    assert engine[name].loaded, engine[name].log[-1000:]
    assert facts.total_bytes + facts.mtp_bytes == engine[name].model_bytes
    assert facts.mtp_bytes or facts.total_params == engine[name].n_params


@pytest.mark.parametrize("name", REAL)
def test_cache_to_the_last_digit(engine: Mapping[str, Answer], name: str) -> None:
    facts = model(name)
    for work, figures in zip(WORK, engine[name].memory_mib, strict=True):
        assert facts.fits_kv_type(work.kv_type) == (figures is not None), work
        if figures is not None:
            expected = pytest.approx(sum(figures), abs=ROUNDING * len(figures))
            assert kv_bytes(facts, work.n_ctx, work.kv_type, work.n_ubatch) / MIB == expected, work


@pytest.mark.parametrize("name", REAL)
def test_compute_buffer(engine: Mapping[str, Answer], name: str) -> None:
    facts = model(name)
    for work, logged in zip(WORK, engine[name].compute_mib, strict=True):
        if logged is not None:
            estimate = compute_bytes(facts, work, Where.all_on("CPU", len(facts.layers)))["CPU"] / MIB
            assert estimate == pytest.approx(logged, rel=0.005), work
