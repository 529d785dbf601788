"""The books of the experts in RAM against all uses added up."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.engine.expert_cache import HORIZON, Expert, ExpertCache, replaced

BYTES = {0: 3, 1: 5}
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(BYTES)), st.dictionaries(st.integers(0, 6), st.integers(1, 3), min_size=1)),
    max_size=40,
)


@given(STEPS, st.integers(0, 60), st.integers(1, 200))
def test_the_least_wanted_go_first_and_the_rest_fits(
    steps: list[tuple[int, dict[int, int]]], room_bytes: int, tokens_between: int
) -> None:
    cache, uses = ExpertCache(BYTES, room_bytes), list[tuple[int, Expert, int]]()
    for layer, chosen in steps:
        cache.now += tokens_between
        before = {(one, index) for one in BYTES for index in range(7) if (one, index) in cache}
        cache.use(layer, chosen)
        cache.admit(layer, sorted(chosen))
        uses += [(cache.now, (layer, index), n) for index, n in chosen.items()]
        kept = {(layer, index) for index in chosen}
        gone = cache.overflow(kept)
        held = before | kept
        assert set(gone) <= held - kept and len(set(gone)) == len(gone)

        wanted: defaultdict[Expert, float] = defaultdict(float)
        for time, expert, n in uses:
            wanted[expert] += n * 2.0 ** ((time - cache.now) / HORIZON)
        stay = held - kept - set(gone)
        assert all(wanted[one] <= wanted[other] * (1 + 1e-9) for one in gone for other in stay)
        held -= set(gone)
        assert len(cache) == len(held) and all(expert in cache for expert in held)
        assert cache.held_bytes == sum(BYTES[layer] for layer, _ in held)
        assert cache.held_bytes <= room_bytes or held == kept
        if gone:  # no more than had to
            assert cache.held_bytes + BYTES[gone[-1][0]] > room_bytes


def test_what_nobody_used_leaves_first_and_the_last_that_came_before_the_others() -> None:
    cache = ExpertCache(BYTES, 100)
    cache.admit(0, (4, 2, 6))
    cache.use(0, {1: 1, 2: 1}, 512)
    cache.admit(0, (1,))
    cache.room_bytes = 0
    assert cache.overflow() == [(0, 6), (0, 4), (0, 1), (0, 2)]
    assert cache.held_bytes == 0 == len(cache)


def test_what_the_system_took_is_not_held_and_may_come_again() -> None:
    cache = ExpertCache(BYTES, 12)
    cache.use(0, {1: 1, 2: 1, 3: 1})
    cache.admit(0, (1, 2, 3))
    cache.forget(0, 2)
    cache.forget(0, 2)
    assert (0, 2) not in cache and cache.free_bytes == 6
    cache.admit(0, (2,))
    cache.room_bytes = 3
    cache.now += 1000
    cache.use(0, {2: 1})
    assert len(cache.overflow()) == 2 and (0, 2) in cache and cache.held_bytes == 3


@pytest.mark.parametrize(
    ("order", "missing", "n_most", "expected"),
    [
        ([5, 3, 1, 0, 2, 4], (), 3, [5, 3, 1]),
        ([5, 3, 1, 0, 2, 4], (1,), 0, [5, 3, 1]),
        ([5, 3, 1, 0, 2, 4], (1,), 1, [5, 3, 0]),
        ([5, 3, 1, 0, 2, 4], (5, 1), 1, [5, 3, 0]),  # the least wanted first
        ([5, 3, 1, 0, 2, 4], (5, 1, 0), 2, [4, 3, 2]),  # the best that are there
        ([5, 3, 1, 0, 2, 4], (5, 3, 1, 0, 2, 4), 3, [5, 3, 1]),  # nobody can stand in
        ([5, 3, 1, 0, 2, 4], (5, 3, 1, 0, 2), 3, [5, 3, 4]),
    ],
)
def test_experts_in_ram_stand_in_for_missing_ones(
    order: list[int], missing: tuple[int, ...], n_most: int, expected: list[int]
) -> None:
    found = replaced(order, 3, missing, n_most)
    assert found == expected and len(set(found)) == 3
