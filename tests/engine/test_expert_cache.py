"""The books of the experts in RAM against a list that is searched from end to end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.engine.expert_cache import Expert, ExpertCache, replaced

BYTES = {0: 3, 1: 5}
STEPS = st.lists(st.tuples(st.sampled_from(sorted(BYTES)), st.sets(st.integers(0, 6), min_size=1)), max_size=40)


@given(STEPS, st.integers(0, 60))
def test_the_least_recently_used_go_first_and_the_rest_fits(steps: list[tuple[int, set[int]]], room_bytes: int) -> None:
    cache, expected = ExpertCache(BYTES, room_bytes), list[Expert]()
    for layer, chosen in steps:
        indices = sorted(chosen)
        held = [(layer, index) for index in indices if (layer, index) in expected]
        missing = [index for index in indices if (layer, index) not in expected]
        assert missing == [index for index in indices if (layer, index) not in cache]
        cache.use(layer, indices)
        cache.admit(layer, missing)
        expected = [one for one in expected if one not in held] + held + [(layer, index) for index in missing]
        gone = cache.overflow(n_kept=2)
        while len(expected) > 2 and sum(BYTES[one[0]] for one in expected) > room_bytes:
            assert gone.pop(0) == expected.pop(0)
        assert not gone
        assert cache.held_bytes == sum(BYTES[one[0]] for one in expected) and len(cache) == len(expected)
        assert cache.free_bytes == room_bytes - cache.held_bytes


def test_what_the_system_took_is_held_no_more() -> None:
    cache = ExpertCache(BYTES, 100)
    cache.admit(1, [2, 3])
    cache.forget(1, 2)
    cache.forget(1, 2)
    assert (1, 2) not in cache and (1, 3) in cache and cache.held_bytes == 5


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
