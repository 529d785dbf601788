"""Statistics of expert choices: values worked out by hand, and what must always hold."""

from __future__ import annotations

import math
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.engine.expert_cache import HORIZON
from moelocal.measure.experts import (
    CACHE_SHARES,
    Recent,
    Tally,
    divergence_bits,
    entropy_bits,
    layer_use,
    slots,
    top_share,
)
from moelocal.model.usage import cache_hits

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=64)


def tally(choices: list[int], n_experts: int, n_used: int = 1) -> Tally:
    made = Tally(n_experts)
    made.add(choices, [1.0] * len(choices), n_used)
    return made


@pytest.mark.parametrize(
    ("counts", "entropy", "evenness", "max_share", "imbalance"),
    [
        ([5, 5, 5, 5], 2.0, 1.0, 0.25, 1.0),
        ([8, 0, 0, 0], 0.0, 0.0, 1.0, 4.0),
        ([2, 1, 1, 0], 1.5, 0.75, 0.5, 2.0),
        ([7], 0.0, 1.0, 1.0, 1.0),
    ],
)
def test_one_layer(counts: list[int], entropy: float, evenness: float, max_share: float, imbalance: float) -> None:
    use = layer_use(3, counts)
    assert (use.layer, use.max_share, use.imbalance) == (3, max_share, imbalance)
    assert use.entropy == pytest.approx(entropy) and use.evenness == pytest.approx(evenness)


def test_unused_and_hot_experts() -> None:
    use = layer_use(0, [0, 10, 1, 1, 0, 1, 1, 1, 1, 8])
    assert use.unused == (0, 4) and use.hot == (1, 9)


def test_shares_of_the_most_used() -> None:
    counts = [1, 2, 3, 4, 5, 6, 7, 8, 9, 55]
    assert top_share(counts, 0.10) == 0.55 and top_share(counts, 0.25) == 0.72 and top_share(counts, 0.5) == 0.85
    assert [slots(share, 16) for share in CACHE_SHARES] == [2, 4, 7, 8, 12]
    assert [slots(share, 10) for share in CACHE_SHARES] == [1, 3, 4, 5, 8]


def test_nothing_chosen() -> None:
    use = layer_use(0, [0, 0, 0])
    assert (use.entropy, use.max_share, use.imbalance, use.unused) == (0.0, 0.0, 0.0, (0, 1, 2))
    assert divergence_bits([0, 0], [1, 1]) == 0.0 and cache_hits([0, 0, 0], 2) == 0.0


@pytest.mark.parametrize(
    ("a", "b", "bits"),
    [([1, 0], [0, 1], 1.0), ([3, 1], [6, 2], 0.0), ([1, 1], [1, 0], 1.5 - 0.75 * math.log2(3) + 0.0)],
)
def test_divergence_by_hand(a: list[int], b: list[int], bits: float) -> None:
    # the third: entropy of (3/4, 1/4) = 2 - 3/4 log2 3, less half of the 1 bit of (1/2, 1/2)
    assert divergence_bits(a, b) == pytest.approx(bits)


def test_reuse_distances_by_hand() -> None:
    # a b a c b a: first times a, b, c; a after 1 other (b); b after 2 (a c); a after 2 (c b)
    assert tally([0, 1, 0, 2, 1, 0], 4).reuse == [0, 1, 2, 0, 3]


def lru_by_simulation(choices: list[int], n_slots: int) -> float:
    cache: list[int] = []
    hits = 0
    for expert in choices:
        if expert in cache:
            hits += 1
            cache.remove(expert)
        cache.append(expert)
        del cache[:-n_slots]
    return hits / len(choices)


@given(st.lists(st.integers(0, 11), min_size=1, max_size=200), st.integers(1, 12))
def test_hits_are_those_of_a_real_cache(choices: list[int], n_slots: int) -> None:
    assert cache_hits(tally(choices, 12).reuse, n_slots) == pytest.approx(lru_by_simulation(choices, n_slots))


@given(st.lists(st.integers(0, 11), max_size=200), st.integers(1, 5))
def test_ranks_are_of_uses_that_fade(choices: list[int], n_used: int) -> None:
    recent, uses = Recent(), dict[int, list[int]]()
    for at, expert in enumerate(choices):
        recent.n_tokens = now = at // n_used
        rank = {one: sum(2 ** (time / HORIZON) for time in times) for one, times in uses.items()}
        _, place = recent.use(expert)
        if place is None:
            assert expert not in uses
        else:
            alike = [one for one in rank if math.isclose(rank[one], rank[expert])]
            n_higher = sum(rank[one] > rank[expert] for one in rank if one not in alike)
            assert n_higher <= place < n_higher + len(alike)
        uses.setdefault(expert, []).append(now)


def test_what_is_used_again_and_again_outranks_what_was_used_last() -> None:
    one = tally([0] * 10 + [1, 0], 2)
    assert (one.reuse, one.ranked) == ([9, 1, 2], [10, 0, 2])


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=150), st.integers(1, 40))
def test_batches_make_no_difference(tokens: list[tuple[int, int]], step: int) -> None:
    choices = list(chain.from_iterable(tokens))
    whole, parts = tally(choices, 8, 2), Tally(8)
    for at in range(0, len(choices), 2 * step):
        parts.add(choices[at : at + 2 * step], [1.0] * len(choices[at : at + 2 * step]), 2)
    assert parts == whole
    assert sum(whole.counts) == sum(whole.reuse) == sum(whole.ranked) == len(choices) and whole.n_tokens == len(tokens)
    assert whole.mass == [float(n) for n in whole.counts]


def test_halves_are_blocks_of_32_tokens_in_turn() -> None:
    one = tally([0] * 32 + [1] * 32 + [2] * 10, 3)
    assert one.halves == ([32, 0, 10], [0, 32, 0])


def test_the_next_text_finds_the_cache_warm() -> None:
    first = tally([0, 1], 2)
    second = Tally(2, first.recent)
    second.add([0, 1], [], 1)
    assert second.reuse == [0, 2, 0] and second.mass == [0.0, 0.0]


def test_an_id_that_no_expert_has() -> None:
    with pytest.raises(ValueError, match="expert 9 of 8"):
        tally([1, 9], 8)


@given(COUNTS)
def test_what_always_holds_of_a_layer(counts: list[int]) -> None:
    use = layer_use(0, counts)
    assert 0 <= use.entropy <= math.log2(len(counts)) + 1e-9 and 0 <= use.evenness <= 1 + 1e-9
    assert len(use.unused) == counts.count(0) and not set(use.hot) & set(use.unused)
    assert list(use.top_shares) == sorted(use.top_shares) and use.top_shares[-1] <= 1 + 1e-9


@given(COUNTS, st.randoms())
def test_what_always_holds_of_a_divergence(counts: list[int], random: object) -> None:
    other = counts[::-1]
    bits = divergence_bits(counts, other)
    assert 0 <= bits <= 1 and bits == pytest.approx(divergence_bits(other, counts))
    assert divergence_bits(counts, [3 * n for n in counts]) == pytest.approx(0.0, abs=1e-9)
    assert entropy_bits(counts) == pytest.approx(entropy_bits(other))
