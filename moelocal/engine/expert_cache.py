"""Which experts RAM holds: the least recently used ones leave. Keeps the books only; see `residency.py`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

Expert = tuple[int, int]  # layer, index


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


class ExpertCache:
    """Experts in the order of their last use. `expert_bytes`: of one expert, by layer."""

    def __init__(self, expert_bytes: Mapping[int, int], room_bytes: int = 0) -> None:
        self.room_bytes, self.held_bytes = room_bytes, 0
        self._expert_bytes = expert_bytes
        self._held: OrderedDict[Expert, None] = OrderedDict()

    def __contains__(self, expert: Expert) -> bool:
        return expert in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def free_bytes(self) -> int:
        """Room for more; negative: too many are held."""
        return self.room_bytes - self.held_bytes

    def use(self, layer: int, experts: Iterable[int]) -> None:
        """Marks those of them that are held as just used."""
        for index in experts:
            if (layer, index) in self._held:
                self._held.move_to_end((layer, index))

    def admit(self, layer: int, experts: Sequence[int]) -> None:
        """Holds more experts, as just used."""
        for index in experts:
            if (layer, index) not in self._held:
                self._held[layer, index] = None
                self.held_bytes += self._expert_bytes[layer]

    def forget(self, layer: int, index: int) -> None:
        """An expert that the system took away."""
        if (layer, index) in self._held:
            del self._held[layer, index]
            self.held_bytes -= self._expert_bytes[layer]

    def overflow(self, n_kept: int = 0) -> list[Expert]:
        """Lets the least recently used go until the rest fits, but not the `n_kept` latest. Returns which went."""
        gone: list[Expert] = []
        while self.held_bytes > self.room_bytes and len(self._held) > n_kept:
            expert, _ = self._held.popitem(last=False)
            self.held_bytes -= self._expert_bytes[expert[0]]
            gone.append(expert)
        return gone
