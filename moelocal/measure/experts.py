"""What router choices say: how evenly experts are used, how soon they come again, how texts differ. Pure.

In: which experts each token chose, in order, taken up by a `Tally` per layer. Out: `LayerUse`, LRU hit rates,
divergences in bits.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moelocal.engine.expert_cache import HORIZON, added

TOP_SHARES = (0.10, 0.25, 0.50)  # of a layer's experts, the most used ones
CACHE_SHARES = (0.10, 0.25, 0.40, 0.50, 0.75)  # of a layer's experts, held by a cache
_HOT = 3.0  # times the mean
_BLOCK_TOKENS = 32


class LayerUse(NamedTuple):
    """One layer's experts. `entropy` in bits of 0 to log2(n_experts); `evenness` the share of that most; `imbalance`
    the busiest expert's choices over the mean; `max_share` its share of all; `unused` never chosen; `hot` chosen more
    than three times as often as the mean, busiest first; `top_shares` what the most used 10, 25 and 50 % of the experts
    take together (at least one expert, a share rounded up)."""

    layer: int
    entropy: float
    evenness: float
    max_share: float
    imbalance: float
    unused: tuple[int, ...]
    hot: tuple[int, ...]
    top_shares: tuple[float, ...]


def layer_use(layer: int, counts: Sequence[int]) -> LayerUse:
    """The statistics of one layer; all zero where nothing was chosen."""
    total = sum(counts)
    if not total:
        return LayerUse(layer, 0.0, 0.0, 0.0, 0.0, tuple(range(len(counts))), (), (0.0,) * len(TOP_SHARES))
    entropy = entropy_bits(counts)
    mean = total / len(counts)
    busiest = sorted(range(len(counts)), key=lambda expert: -counts[expert])
    return LayerUse(
        layer=layer,
        entropy=entropy,
        evenness=entropy / math.log2(len(counts)) if len(counts) > 1 else 1.0,
        max_share=max(counts) / total,
        imbalance=max(counts) / mean,
        unused=tuple(expert for expert, n in enumerate(counts) if n == 0),
        hot=tuple(expert for expert in busiest if counts[expert] > _HOT * mean),
        top_shares=tuple(top_share(counts, share) for share in TOP_SHARES),
    )


def entropy_bits(counts: Sequence[float]) -> float:
    """Entropy of a distribution given by counts: -sum(p log2 p).

    Source: Shannon, A Mathematical Theory of Communication, 1948.
    """
    total = sum(counts)
    return max(0.0, -sum(n / total * math.log2(n / total) for n in counts if n)) if total else 0.0


def top_share(counts: Sequence[int], share: float) -> float:
    """The share of all choices that the most used `share` of the experts take."""
    total = sum(counts)
    return sum(sorted(counts, reverse=True)[: slots(share, len(counts))]) / total if total else 0.0


def slots(share: float, n_experts: int) -> int:
    """How many experts a share of them is: at least one, rounded up."""
    return max(1, math.ceil(share * n_experts - 1e-9))


@dataclass(slots=True)
class Recent:
    """One layer's experts after `n_tokens`: `latest` by their last time, the latest first; `ranking` by their `ranks`
    (see `engine.expert_cache`), the highest first."""

    n_tokens: int = 0
    latest: list[int] = field(default_factory=list)
    ranking: list[int] = field(default_factory=list)
    ranks: dict[int, float] = field(default_factory=dict)

    def use(self, expert: int) -> tuple[int | None, int | None]:
        """Takes a choice. Returns the expert's places in `latest` and in `ranking` before; None: it is new."""
        use = self.n_tokens / HORIZON
        old = self.ranks.get(expert)
        if old is None:
            last = place = None
            self.ranks[expert] = use
        else:
            last, place = self.latest.index(expert), self.ranking.index(expert)
            del self.latest[last], self.ranking[place]
            self.ranks[expert] = added(old, use)
        self.latest.insert(0, expert)
        insort(self.ranking, expert, key=lambda one: -self.ranks[one])
        return last, place


@dataclass(slots=True)
class Tally:
    """Counts one layer's choices as they come, in memory that does not grow with the text.

    `reuse`: how soon experts come again: entry d counts choices of an expert after d others were chosen since its
    last time, entry `n_experts` the first times. A cache that keeps the S experts used last (LRU) hits exactly the
    distances below S, whatever S is. `ranked`: the same for the cache that moelocal keeps (`engine.expert_cache`):
    entry d counts choices of an expert while d others ranked higher. `recent`: the next text's tally may go on with
    it. `mass` adds up the weights that each expert's output got. `halves` are the counts of blocks of 32 tokens
    taken in turn: what differs between them is chance, to hold the difference of two texts against.

    Source: Mattson et al., Evaluation techniques for storage hierarchies, 1970 (stack distances).
    """

    n_experts: int
    recent: Recent = field(default_factory=Recent)
    n_tokens: int = 0
    mass: list[float] = field(init=False)
    reuse: list[int] = field(init=False)
    ranked: list[int] = field(init=False)
    halves: tuple[list[int], list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.mass = [0.0] * self.n_experts
        self.reuse, self.ranked = [0] * (self.n_experts + 1), [0] * (self.n_experts + 1)
        self.halves = [0] * self.n_experts, [0] * self.n_experts

    @property
    def counts(self) -> list[int]:
        """How often each expert was chosen."""
        return [a + b for a, b in zip(*self.halves, strict=True)]

    def add(self, experts: Sequence[int], weights: Sequence[float], n_used: int) -> None:
        """Takes the choices of the next tokens: `n_used` a token, weights of the same length or none.

        Raises:
            ValueError: an id that no expert has.
        """
        if len(experts) and not 0 <= min(experts) <= max(experts) < self.n_experts:
            raise ValueError(f"expert {max(experts)} of {self.n_experts}")
        step = _BLOCK_TOKENS * n_used
        at = 0
        while at < len(experts):
            tokens_done = self.n_tokens + at // n_used
            end = min(len(experts), at + step - tokens_done % _BLOCK_TOKENS * n_used)
            side = self.halves[tokens_done // _BLOCK_TOKENS % 2]
            for expert, n in Counter(experts[at:end]).items():
                side[expert] += n
            at = end
        for expert, weight in zip(experts, weights, strict=False):
            self.mass[expert] += weight
        for at, expert in enumerate(experts):
            self.recent.n_tokens += at % n_used == 0
            last, rank = self.recent.use(expert)
            self.reuse[self.n_experts if last is None else last] += 1
            self.ranked[self.n_experts if rank is None else rank] += 1
        self.n_tokens += len(experts) // n_used


def divergence_bits(a: Sequence[int], b: Sequence[int]) -> float:
    """Jensen-Shannon divergence of two distributions given by counts: 0 equal, 1 nothing in common; 0 if one is empty.

    Source: Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    n_a, n_b = sum(a), sum(b)
    if not n_a or not n_b:
        return 0.0
    p, q = [n / n_a for n in a], [n / n_b for n in b]
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return min(1.0, max(0.0, entropy_bits(middle) - (entropy_bits(p) + entropy_bits(q)) / 2))
