"""Which experts RAM holds, and which leave first. Keeps the books only; see `residency.py`.

Each use of an expert counts half of one `HORIZON` tokens later; the expert with the least leaves. So what was used once
just now leaves before what is used again and again, which a cache of the least recently used (LRU) has the other way
round; `scripts/cache_policies.py` compares them.

Source: Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used
policies", IEEE Transactions on Computers 50 (2001).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

Expert = tuple[int, int]  # layer, index
HORIZON = 64  # tokens: from 16 to 256 the fewest misses, taken together (docs/residency.md)
_NEVER = -1e6  # ranks of experts that nobody used yet lie below


class ResidencyStats(NamedTuple):
    """Of the tokens generated so far: choices of experts that were in RAM, and that were not; bytes asked for; choices
    that were replaced before, if that was asked for: they count as hits."""

    n_tokens: int = 0
    n_hits: int = 0
    n_misses: int = 0
    n_bytes: int = 0
    n_replaced: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the chosen experts that were in RAM."""
        return self.n_hits / max(1, self.n_hits + self.n_misses)

    @property
    def bytes_per_token(self) -> float:
        """Bytes read from the disk for a token."""
        return self.n_bytes / max(1, self.n_tokens)


def replaced(order: Sequence[int], n_used: int, missing: Collection[int], n_most: int) -> list[int]:
    """A token's choice with at most `n_most` of its missing experts replaced, the least wanted first, by the best that
    are in RAM: of the next `n_used` in `order`, the router's of all experts, the likeliest first."""
    chosen = list(order[:n_used])
    others = [index for index in order[n_used : 2 * n_used] if index not in missing]
    for place in reversed(range(n_used)):
        if n_most and others and chosen[place] in missing:
            chosen[place] = others.pop(0)
            n_most -= 1
    return chosen


def added(rank: float, use: float) -> float:
    """A rank after one more use: log2(2 ** rank + 2 ** use)."""
    return max(rank, use) + math.log2(1 + 2.0 ** -min(64.0, abs(rank - use)))


class ExpertCache:
    """Experts by rank: log2 of the sum of 2 ** (time / HORIZON) over their uses; waiting does not change its order.
    `expert_bytes`: of one expert, by layer; `now`: the time in tokens."""

    def __init__(self, expert_bytes: Mapping[int, int], room_bytes: int = 0) -> None:
        self.room_bytes, self.held_bytes, self.now = room_bytes, 0, 0
        self._expert_bytes = expert_bytes
        self._held: dict[Expert, None] = {}
        self._ranks: dict[Expert, float] = {}  # of all experts, since what left may come again
        self._heap: list[tuple[float, Expert]] = []  # of those held; ranks only grow, so these may be too low

    def __contains__(self, expert: Expert) -> bool:
        return expert in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def free_bytes(self) -> int:
        """Room for more; negative: too many are held."""
        return self.room_bytes - self.held_bytes

    def use(self, layer: int, uses: Mapping[int, int], n_tokens: int = 1) -> None:
        """Counts how often each expert was chosen by the last `n_tokens` tokens, held or not."""
        share = min(1.0, HORIZON / math.log(2) / n_tokens)  # of them counts, if they came evenly
        for index, n in uses.items():
            new = self.now / HORIZON + math.log2(n * share)
            self._ranks[layer, index] = added(self._ranks.get((layer, index), _NEVER), new)

    def admit(self, layer: int, experts: Sequence[int]) -> None:
        """Holds more experts. Of those that were never used, the first to come are the last to leave."""
        for index in experts:
            if (layer, index) not in self._held:
                rank = self._ranks.setdefault((layer, index), _NEVER - len(self._held))
                heapq.heappush(self._heap, (rank, (layer, index)))
                self._held[layer, index] = None
                self.held_bytes += self._expert_bytes[layer]

    def forget(self, layer: int, index: int) -> None:
        """An expert that the system took away."""
        if (layer, index) in self._held:
            del self._held[layer, index]
            self.held_bytes -= self._expert_bytes[layer]

    def overflow(self, kept: Collection[Expert] = ()) -> list[Expert]:
        """Lets the lowest ranks go until the rest fits, but not the `kept`. Returns which went."""
        gone: list[Expert] = []
        aside: list[tuple[float, Expert]] = []
        while self.held_bytes > self.room_bytes and self._heap:
            rank, expert = heapq.heappop(self._heap)
            if expert not in self._held:
                continue
            if expert in kept:
                aside.append((rank, expert))
            elif rank < self._ranks[expert]:
                heapq.heappush(self._heap, (self._ranks[expert], expert))
            else:
                self.forget(*expert)
                gone.append(expert)
        for one in aside:
            heapq.heappush(self._heap, one)
        return gone
