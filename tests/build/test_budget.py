"""The choice of types within a size: against brute force, and its invariants."""

from __future__ import annotations

import itertools
import random

import pytest

from moelocal.build.budget import Choice, Option, choose, least_bytes, most_bytes, total, with_costs


def _random_choices(rng: random.Random, n: int) -> list[Choice]:
    return [
        Choice(
            f"t{i}",
            tuple(Option(kind, 32 * rng.randint(1, 12), rng.random()) for kind in range(rng.randint(1, 4))),
        )
        for i in range(n)
    ]


def _brute(choices: list[Choice], room: int) -> float:
    return min(
        (
            sum(one.loss for one in combination)
            for combination in itertools.product(*(choice.options for choice in choices))
            if sum(one.n_bytes for one in combination) <= room
        ),
        default=float("inf"),
    )


@pytest.mark.parametrize("seed", range(20))
def test_nothing_better_fits(seed: int) -> None:
    rng = random.Random(seed)
    choices = _random_choices(rng, 5)
    room = rng.randint(least_bytes(choices), most_bytes(choices) + 64)
    n_bytes, loss = total(choices, choose(choices, room))
    assert n_bytes <= room
    assert loss == pytest.approx(_brute(choices, room))


def test_more_room_is_never_more_loss_and_never_overspent() -> None:
    rng = random.Random(7)
    # sizes without a common divisor: the table's steps are coarser than a byte
    choices = [
        Choice(f"t{i}", tuple(Option(k, rng.randint(1, 10**8), rng.random()) for k in range(8))) for i in range(40)
    ]
    low, high = least_bytes(choices), most_bytes(choices)
    losses = []
    for room in range(low, high, (high - low) // 50):
        n_bytes, loss = total(choices, choose(choices, room))
        assert n_bytes <= room
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_a_budget_below_the_least_is_refused_and_a_large_one_takes_the_best() -> None:
    choices = [Choice("a", (Option(1, 64, 0.5), Option(2, 128, 0.1), Option(3, 256, 0.3)))]
    with pytest.raises(ValueError, match="1 bytes too little"):
        choose(choices, 63)
    assert choose(choices, 64) == {"a": 1}
    assert choose(choices, 10**12) == {"a": 2}  # larger and worse is never taken


def test_seconds_decide_between_types_that_are_as_good() -> None:
    choices = [Choice("a", (Option(20, 100, 0.10), Option(23, 90, 0.101)))]
    assert choose(choices, 100) == {"a": 20}
    costs = {("a", 20): 2.0, ("a", 23): 1.0}
    assert choose(with_costs(choices, costs, weight=0.05), 100) == {"a": 23}
