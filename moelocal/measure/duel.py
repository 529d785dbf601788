"""Which of two things is faster, on a computer whose speed changes by itself: they take turns, and pairs count. Pure.

ratio = duel(first, second, most_pairs=7)        # seconds of the second over those of the first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, sqrt
from statistics import fmean, median, stdev
from typing import NamedTuple

_LEAST_PAIRS = 3
# Standard errors that count as beyond the noise, by the number of pairs: Student's t, 95 %, two-sided.
_SURE = (inf, inf, 12.7, 4.3, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_CLEAR = 0.25  # two pairs that both differ by so much in one direction need no third


class Ratio(NamedTuple):
    """The median of the pairs' ratios, and how far it may be off (one standard error of the mean)."""

    value: float
    error: float
    pairs: tuple[float, ...]

    @property
    def n_pairs(self) -> int:
        """Pairs that were measured."""
        return len(self.pairs)

    @property
    def noise(self) -> float:
        """How far the value may be off, with 95 % confidence."""
        return _SURE[min(self.n_pairs, len(_SURE) - 1)] * self.error

    def may_be_faster(self, by: float) -> bool:
        """Whether the second looks faster, is not surely so, and may be so by `by`."""
        return self.value < 1 and not self.is_faster and self.value - self.noise < 1 - by

    @property
    def is_likely_faster(self) -> bool:
        """Whether the second is faster by more than one standard error: to be taken where nothing speaks against it."""
        return 1 - self.value > self.error

    @property
    def is_slower(self) -> bool:
        """Whether the second is slower, beyond the noise."""
        return self.value - 1 > self.noise

    @property
    def is_faster(self) -> bool:
        """Whether the second is faster, beyond the noise."""
        return 1 - self.value > self.noise


def duel(
    first: Callable[[], float],
    second: Callable[[], float],
    most_pairs: int,
    least_gain: float = 0.01,
    may_go_on: Callable[[], bool] = lambda: True,
    before: Sequence[float] = (),
) -> Ratio:
    """Seconds of the second over seconds of the first, in pairs that take turns at going first.

    Ends when one is faster beyond the noise, or when neither can be by `least_gain` any more.

    Args:
        first, second: measure once, and return seconds.
        most_pairs: at most, those before included.
        least_gain: a smaller difference does not matter.
        may_go_on: asked before each pair but the first; False ends it.
        before: pairs of an earlier duel between the two, which count too.
    """
    ratios = list(before)
    while len(ratios) < most_pairs and not _is_settled(ratios, least_gain):
        if ratios and not may_go_on():
            break
        if len(ratios) % 2:
            other, one = second(), first()
        else:
            one, other = first(), second()
        ratios.append(other / one)
    return ratio_of(ratios)


def _is_settled(ratios: Sequence[float], least_gain: float) -> bool:
    """Whether another pair would change nothing."""
    if len(ratios) < 2:
        return False
    found = ratio_of(ratios)
    if len(ratios) < _LEAST_PAIRS:
        return min(ratios) > 1 + _CLEAR or max(ratios) < 1 - _CLEAR
    is_close = abs(found.value - 1) + found.noise < least_gain
    return found.is_slower or found.is_faster or is_close


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """The median, and the standard error of the mean; of one pair alone nothing is certain."""
    if len(ratios) < 2:
        return Ratio(ratios[0], abs(ratios[0] - 1), tuple(ratios))
    return Ratio(median(ratios), max(stdev(ratios) / sqrt(len(ratios)), 0.002 * fmean(ratios)), tuple(ratios))
