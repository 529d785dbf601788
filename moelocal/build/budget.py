"""One type for each tensor, so that all fit a size and the expected loss is least. Pure.

    choices = [Choice("blk.0.attn_q.weight", (Option(12, 9216, 0.004), Option(14, 13440, 0.0003))), ...]
    chosen = choose(choices, room_bytes)        # {"blk.0.attn_q.weight": 12, ...}

A multiple-choice knapsack. It is solved by dynamic programming over bytes in steps of their common divisor, or of
1/65,536 of the range where that is finer: the steps do not depend on the room, so more room never means more loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_N_STEPS = 1 << 16


class Option(NamedTuple):
    """A type (of `GGML_TYPES`) that a tensor may get, what it then takes in the file, and the expected loss."""

    ggml_type: int
    n_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A tensor and the types that it may get."""

    name: str
    options: tuple[Option, ...]

    @property
    def least_bytes(self) -> int:
        """What it takes at least."""
        return min(option.n_bytes for option in self.options)


def least_bytes(choices: Sequence[Choice]) -> int:
    """The smallest size there is."""
    return sum(choice.least_bytes for choice in choices)


def most_bytes(choices: Sequence[Choice]) -> int:
    """The size beyond which more room changes nothing."""
    return sum(min(c.options, key=lambda one: (one.loss, one.n_bytes)).n_bytes for c in choices)


def with_costs(choices: Sequence[Choice], costs: Mapping[tuple[str, int], float], weight: float) -> list[Choice]:
    """Choices whose loss also counts what else a type costs. `costs`: by tensor and type; `weight`: loss per cost."""
    return [
        Choice(
            c.name, tuple(o._replace(loss=o.loss + weight * costs.get((c.name, o.ggml_type), 0.0)) for o in c.options)
        )
        for c in choices
    ]


def total(choices: Sequence[Choice], chosen: Mapping[str, int]) -> tuple[int, float]:
    """Bytes and loss of what was chosen."""
    taken = [next(one for one in c.options if one.ggml_type == chosen[c.name]) for c in choices]
    return sum(one.n_bytes for one in taken), math.fsum(one.loss for one in taken)


def choose(choices: Sequence[Choice], room_bytes: int) -> dict[str, int]:
    """The types with the least loss that take at most `room_bytes` together, by tensor.

    Raises:
        ValueError: they do not fit, whatever is chosen.
    """
    import numpy as np

    if (spare := room_bytes - least_bytes(choices)) < 0:
        raise ValueError(f"{-spare} bytes too little")
    useful = [_useful(choice) for choice in choices]
    if room_bytes >= most_bytes(choices):
        return {choice.name: options[-1].ggml_type for choice, options in zip(choices, useful, strict=True)}
    step = _step([option.n_bytes - options[0].n_bytes for options in useful for option in options[1:]])
    n_most = sum(-(-(options[-1].n_bytes - options[0].n_bytes) // step) for options in useful)
    width = min(spare // step, n_most) + 1
    best = np.zeros(width)
    taken = []
    for options in useful:
        new, index = best + options[0].loss, np.zeros(width, np.uint8)
        for number, option in enumerate(options[1:], 1):
            steps = -(-(option.n_bytes - options[0].n_bytes) // step)
            if steps >= width:
                break
            sums = best[: width - steps] + option.loss
            better = sums < new[steps:]
            new[steps:][better] = sums[better]
            index[steps:][better] = number
        best = new
        taken.append(index)
    at, chosen = width - 1, {}
    for choice, options, index in zip(reversed(choices), reversed(useful), reversed(taken), strict=True):
        option = options[int(index[at])]
        at -= -(-(option.n_bytes - options[0].n_bytes) // step)
        chosen[choice.name] = option.ggml_type
    return {choice.name: chosen[choice.name] for choice in choices}


def _useful(choice: Choice) -> list[Option]:
    """Options from the smallest, each larger one with less loss."""
    kept: list[Option] = []
    for option in sorted(choice.options, key=lambda one: (one.n_bytes, one.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _step(growths: Sequence[int]) -> int:
    """Bytes of a step of the table."""
    common = math.gcd(*growths) if growths else 1
    return max(common, -(-sum(growths) // _N_STEPS), 1)
