"""Logits of chosen tokens, read where llama.cpp wrote them; memory and experts as planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelocal.engine.logits import chunk_logits
from moelocal.engine.session import Session, load
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header
from moelocal.plan.llama_flags import flags_of_plan
from moelocal.plan.memory import Sizes
from moelocal.plan.planner import Plan
from tests.conftest import DEMO

PLAN = Plan(n_ctx=64, kv_type="f16", n_ubatch=64, threads=1, n_gpu_layers=0, repack=True, load_mode="mmap")


def opened(plan: Plan, path: Path = DEMO) -> Session:
    return load([path], read_header(path), plan, one_shot=True)


def logits(session: Session, tokens: list[int], wanted: range) -> Any:
    parts = [
        (rows.start, np.frombuffer(rows.floats, np.float32).reshape(rows.n, -1).copy())
        for rows in chunk_logits(session, tokens, wanted)
    ]
    starts = [start for start, _ in parts]
    assert starts == sorted(starts) and starts[0] == wanted.start
    return np.concatenate([part for _, part in parts])


def test_rows_are_those_of_the_positions_asked_for() -> None:
    with opened(replace(PLAN, n_outputs=64)) as session:
        tokens = session.tokenize("Once upon a time there was a little wolf named Mia. " * 8, special=False)[:64]
        everything = logits(session, tokens, range(64))
        assert everything.shape == (64, session.n_vocab)
        some = logits(session, tokens, range(32, 63))
        assert np.array_equal(some, everything[32:63])
        assert session.cached == tokens
    with opened(replace(PLAN, n_outputs=20, n_ubatch=20)) as session:
        small = logits(session, tokens, range(32, 63))
        # another batch is another order of sums, which may send a token to another expert
        assert np.median(np.abs(small - some)) < 0.1 and (small.argmax(axis=1) == some.argmax(axis=1)).mean() > 0.9


def test_what_the_logits_take_is_planned(tiny: Callable[[str], Path]) -> None:
    for path in (DEMO, tiny("tiny-qwen3moe")):
        facts = read_facts(read_header(path))
        plan = replace(PLAN, n_ctx=512, n_ubatch=512, n_outputs=255)
        planned = Sizes.of(facts, 512, "f16", 512, 255).ram_compute
        with opened(plan, path) as session:
            session.open()
            took = session.allocated[-1].compute_bytes
        assert took == pytest.approx(planned, rel=0.02)


def test_another_number_of_experts() -> None:
    header = read_header(DEMO)
    assert flags_of_plan(replace(PLAN, experts_used=1), header).experts_used == ("llama.expert_used_count", 1)
    tokens = list(range(300, 364))
    found = []
    for used in (None, 2, 1):
        with opened(replace(PLAN, n_outputs=64, experts_used=used)) as session:
            found.append(logits(session, tokens, range(32, 63)))
    assert np.array_equal(found[0], found[1]) and not np.allclose(found[0], found[2])
