"""Candidates for where every layer and its experts live, given how much each device holds. Pure.

What every token uses goes on the GPUs first; routed experts fill what is left, those that save the most seconds per
byte first, and the layer after the last whole one in part. Experts are taken in one fixed order, so a larger card holds
whatever a smaller one did. Layers of a device are neighbours and the CPU's come first: llama.cpp knows no other order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from math import comb
from typing import NamedTuple

from moelocal.model.facts import LayerFacts
from moelocal.plan.cost import Costs, Placement, Seconds
from moelocal.plan.fit import fit_layout
from moelocal.plan.memory import CPU, MemoryUse, Sizes, placed
from moelocal.plan.request import margin_bytes

BETTER = 1 - 1e-10  # of equals the first one counts, whatever the order of a sum does to its last digits
_FEW = 3
_FEW_SPLITS = 60  # of the layers among devices: tried all
_STEPS = (8, 4, 2, 1)  # layers moved between neighbouring devices while that helps


class Room(NamedTuple):
    """A device that may hold layers: bytes for weights and KV, of which `stage` are lost when it computes experts that
    stay in RAM."""

    name: str
    bytes: int
    stage: int


class Search:
    """One search: fixed costs, sizes and rooms. `weigh` makes one number of seconds."""

    def __init__(
        self,
        costs: Costs,
        sizes: Sizes,
        rooms: tuple[Room, ...],
        weigh: Callable[[Seconds], float],
        n_away: int | None = None,
    ) -> None:
        self.costs, self.n_away, self._sizes, self._weigh = costs, n_away, sizes, weigh
        self._rooms = rooms
        self._layers = costs.facts.layers
        facts = costs.facts
        self._tail = facts.output_bytes + facts.other_bytes + sizes.extra_kv
        self._dense = [layer.always_active_bytes + kv for layer, kv in zip(self._layers, sizes.kv, strict=True)]
        self._full = [n + layer.routed_expert_bytes for n, layer in zip(self._dense, self._layers, strict=True)]
        self._smallest = min((t.n_bytes for layer in self._layers for t in layer.expert_tensors), default=0)
        self._order: dict[str, list[int]] = {}
        self._hop = weigh(costs.hop)
        self._saved: dict[tuple[int, str, str], tuple[float, ...]] = {}
        self._made: dict[tuple[tuple[tuple[str, int], ...], bool], Placement | None] = {}
        self._known: dict[Placement, tuple[dict[str, MemoryUse], Seconds]] = {}

    def weighed(self, placement: Placement) -> tuple[dict[str, MemoryUse], Seconds]:
        """The memory and the seconds of a placement, computed once."""
        found = self._known.get(placement)
        if found is None:
            uses = placed(self.costs.facts, self.costs.machine, placement, self._sizes)
            found = self._known[placement] = uses, self.costs.total(placement, self._sizes, uses)
        return found

    def candidates(self) -> Iterator[Placement]:
        """Placements worth comparing; the first one uses no GPU."""
        n = len(self._layers)
        yield Placement((CPU,) * n, (CPU,) * n, CPU)
        yield from (Placement((CPU,) * n, (CPU,) * n, room.name) for room in self._rooms if room.bytes >= self._tail)
        best: tuple[float, tuple[Room, ...], Placement, list[int]] | None = None
        for rooms in self._groups():
            counts = self._most(rooms, self._dense, is_staged=False)
            for placement, split in self._split(rooms, counts) if sum(counts) == n else ():
                yield placement
                score = self._score(placement) if len(self._rooms) > 1 else 0.0
                if best is None or score < best[0] * BETTER:
                    best = score, rooms, placement, split
            counts = self._most(rooms, self._dense, is_staged=True)
            if len(rooms) == 1:
                counts = [self._worth(rooms[0], counts[0])]
            made = [self._built(rooms, counts)] if sum(counts) < n else []
            if self.costs.facts.is_moe and self.n_away is None:
                made.append(self._built(rooms, self._most(rooms, self._full, is_staged=False), is_whole=True))
            yield from filter(None, made)
        if best is not None and len(best[1]) > 1:
            yield self._improved(*best)
        if self.n_away is None and not self.costs.work.repack and self.costs.work.load_mode == "mmap":
            yield from self._like_fit()

    def _like_fit(self) -> Iterator[Placement]:
        """What llama.cpp's `--fit` would do, and the same layers per device filled up."""
        here = self.costs.machine
        free = tuple(device.free_bytes + margin_bytes(device) for device in here.gpus)
        fit = fit_layout(self.costs.facts, here, self._sizes, free)
        if fit is not None:
            yield fit
            counts = [fit.layers.count(room.name) for room in self._rooms]
            yield from filter(None, [self._built(self._rooms, counts, is_whole=True)])

    def _groups(self) -> Iterator[tuple[Room, ...]]:
        """Which devices to use together: of a few all combinations, of many all, all but one, and each alone."""
        n = len(self._rooms)
        sizes = range(n, 0, -1) if n <= _FEW else (n, n - 1, 1)
        for size in sizes:
            yield from combinations(self._rooms, size)

    def _split(self, rooms: tuple[Room, ...], dense: list[int]) -> Iterator[tuple[Placement, list[int]]]:
        """All layers on these devices, with the layers per device: from several starts."""
        starts = [dense]
        if len(rooms) > 1:
            starts = [self._balanced(rooms), dense, *(self._one_whole(rooms, index) for index in range(len(rooms)))]
            if comb(len(self._layers) + len(rooms) - 1, len(rooms) - 1) <= _FEW_SPLITS:
                starts += list(_all_splits(len(self._layers), len(rooms)))
        for counts in starts:
            placement = self._built(rooms, counts)
            if placement is not None:
                yield placement, counts

    def _one_whole(self, rooms: tuple[Room, ...], index: int) -> list[int]:
        """Layers per device, if one has only layers with all of their experts and the others share the rest."""
        mean = max(1, sum(self._full) // len(self._full))
        own = max(
            0, min(len(self._full), (rooms[index].bytes - (self._tail if index == len(rooms) - 1 else 0)) // mean)
        )
        others = [0 if i == index else room.bytes for i, room in enumerate(rooms)]
        left, total = len(self._full) - own, max(1, sum(others))
        shares = [left * sum(others[: i + 1]) // total - left * sum(others[:i]) // total for i in range(len(rooms))]
        shares[index] = own
        return shares

    def _improved(self, score: float, rooms: tuple[Room, ...], best: Placement, counts: list[int]) -> Placement:
        """The best split found by moving layers between neighbouring devices while that helps."""
        for step in _STEPS:
            for left in range(len(rooms) - 1):
                for moved in (step, -step):
                    while True:
                        trial = [*counts]
                        trial[left] += moved
                        trial[left + 1] -= moved
                        built = self._built(rooms, trial) if min(trial) >= 0 else None
                        if built is None or self._score(built) >= score * BETTER:
                            break
                        best, counts, score = built, trial, self._score(built)
        return best

    def _score(self, placement: Placement) -> float:
        return self._weigh(self.weighed(placement)[1])

    def _most(self, rooms: tuple[Room, ...], needs: list[int], is_staged: bool) -> list[int]:
        """How many layers of these bytes each device takes at most, from the last layer back."""
        counts, at, tail = [0] * len(rooms), len(needs), self._tail
        for index in reversed(range(len(rooms))):
            left, has_moe = rooms[index].bytes - tail, False
            while at > 0:
                has_moe = has_moe or self._is_moe(at - 1)
                if needs[at - 1] > left - (rooms[index].stage if is_staged and has_moe else 0):
                    break
                at -= 1
                left -= needs[at]
                counts[index] += 1
            tail = 0 if counts[index] else tail
        return counts

    def _worth(self, room: Room, most: int) -> int:
        """How many layers, at most so many, save the most seconds on a device when their experts stay in RAM."""
        if self._is_short:
            return most
        best, best_gain, gain = 0, 0.0, 0.0
        saved = {kind: self._saved_away(room, self._layers[kind]) for kind in set(self._sizes.kinds)}
        for count, kind in enumerate(reversed(self._sizes.kinds[len(self._layers) - most :]), 1):
            gain += saved[kind]
            if gain > best_gain:
                best, best_gain = count, gain
        return best

    def _saved_away(self, room: Room, layer: LayerFacts) -> float:
        """Seconds that a layer saves on a device while its experts stay in RAM."""
        saved = self._weigh(self.costs.dense(CPU, layer)) - self._weigh(self.costs.dense(room.name, layer))
        saved -= 2 * self._hop if layer.expert_tensors else 0
        for tensor in layer.expert_tensors:
            saved += self._weigh(self.costs.expert(CPU, CPU, layer, tensor))
            saved -= self._weigh(self.costs.expert(room.name, CPU, layer, tensor))
        return saved

    def _stage(self, room: Room) -> int:
        return room.stage if self.costs.facts.is_moe else 0

    def _is_moe(self, index: int) -> bool:
        return bool(self._layers[index].expert_tensors)

    def _balanced(self, rooms: tuple[Room, ...]) -> list[int]:
        total, n, done, counts = sum(room.bytes for room in rooms), len(self._layers), 0.0, list[int]()
        for room in rooms:
            done += room.bytes
            counts.append(round(n * done / max(1, total)) - sum(counts))
        return counts

    def _built(self, rooms: tuple[Room, ...], counts: list[int], is_whole: bool = False) -> Placement | None:
        """The placement with so many layers per device, if they fit. Experts go there when all layers are on GPUs, or
        when `is_whole`: then the layers that are not stay in RAM with theirs, and nothing is ever copied."""
        used = [(room, count) for room, count in zip(rooms, counts, strict=True) if count]
        key = tuple((room.name, count) for room, count in used), is_whole
        if key not in self._made:
            self._made[key] = self._make(used, is_whole) if used else None
        return self._made[key]

    def _make(self, used: list[tuple[Room, int]], is_whole: bool) -> Placement | None:
        n = len(self._layers)
        at = n - sum(count for _, count in used)
        homes, experts = [CPU] * n, [CPU] * n
        parts: list[tuple[str, str]] = []
        fills = at == 0 or is_whole
        spare: dict[str, int] = {}
        for room, count in used:
            indices = range(at, at + count)
            at += count
            homes[indices.start : indices.stop] = [room.name] * count
            left = room.bytes - sum(self._dense[i] for i in indices) - (self._tail if at == n else 0)
            rest = self._fill(room, indices, left, fills, experts, parts) if left >= 0 else -1
            if rest < 0:
                return None
            spare[room.name] = rest
        if fills and len(used) > 1 and self.n_away is None:
            self._spill(used[0][0], spare, homes, experts, parts)
        return Placement(tuple(homes), tuple(experts), used[-1][0].name, tuple(parts))

    def _fill(
        self, room: Room, indices: range, left: int, fills: bool, experts: list[str], parts: list[tuple[str, str]]
    ) -> int:
        """Puts experts of these layers on the device. Bytes left; negative if something does not fit that must."""
        moe = [i for i in indices if self._is_moe(i)]
        for i in set(indices) - set(moe):
            experts[i] = room.name
        order = self._ordered(room)
        if self.n_away is not None:
            order = order[: max(0, len(order) - self.n_away)]
        chosen = [i for i in order if i in indices] if fills else []
        need = sum(self._layers[i].routed_expert_bytes for i in chosen)
        if len(chosen) < len(moe) or need > left:
            left -= self._stage(room)
        if left < 0 or (self.n_away is not None and need > left):
            return -1
        for i in chosen:
            layer = self._layers[i]
            if layer.routed_expert_bytes > left:
                added = list(self._part(room, layer, left))
                parts += added
                names = {name for name, _ in added}
                return left - sum(t.n_bytes for t in layer.expert_tensors if t.name in names)
            left -= layer.routed_expert_bytes
            experts[i] = room.name
        return left

    def _spill(
        self,
        room: Room,
        spare: dict[str, int],
        homes: list[str],
        experts: list[str],
        parts: list[tuple[str, str]],
    ) -> None:
        """Puts single expert tensors of layers that are not whole where another GPU has bytes to spare."""
        done = {tensor for tensor, _ in parts}
        for i in self._ordered(room):
            if max(spare.values()) < self._smallest:
                break
            for tensor in self._layers[i].expert_tensors if experts[i] == CPU != homes[i] else ():
                for name, left in spare.items():
                    if tensor.n_bytes <= left and tensor.name not in done:
                        parts.append((tensor.name, name))
                        done.add(tensor.name)
                        spare[name] -= tensor.n_bytes
        for i, (home, where) in enumerate(zip(homes, experts, strict=True)):
            if where == home != CPU and max(spare.values()) >= self._smallest:
                self._lend(i, home, spare, parts)

    def _lend(self, index: int, home: str, spare: dict[str, int], parts: list[tuple[str, str]]) -> None:
        """Moves experts of a slow GPU to a faster one that has bytes to spare, if that is worth two hops a token."""
        for name in spare:
            if spare[name] < self._smallest:
                continue
            moved: list[tuple[str, str]] = []
            gain, left = -2 * self._hop, spare[name]
            for tensor, saved in zip(self._layers[index].expert_tensors, self._savings(index, home, name), strict=True):
                if saved > 0 and tensor.n_bytes <= left:
                    moved.append((tensor.name, name))
                    left -= tensor.n_bytes
                    gain += saved
            if gain > 0:
                parts += moved
                spare[home] += spare[name] - left
                spare[name] = left
                return

    def _savings(self, index: int, home: str, name: str) -> tuple[float, ...]:
        """Seconds that each expert tensor of a layer saves on another device than its home."""
        kind = self._sizes.kinds[index]
        key = kind, home, name
        if key not in self._saved:
            layer, costs = self._layers[kind], self.costs
            self._saved[key] = tuple(
                self._weigh(costs.expert(home, home, layer, tensor))
                - self._weigh(costs.expert(home, name, layer, tensor))
                for tensor in layer.expert_tensors
            )
        return self._saved[key]

    def _part(self, room: Room, layer: LayerFacts, left: int) -> Iterator[tuple[str, str]]:
        """The layer's smallest tensors that fit."""
        for tensor in sorted(layer.expert_tensors, key=lambda tensor: tensor.n_bytes):
            left -= tensor.n_bytes
            slow = self._weigh(self.costs.expert(room.name, CPU, layer, tensor))
            if left < 0 or self._weigh(self.costs.expert(room.name, room.name, layer, tensor)) > slow:
                return
            yield tensor.name, room.name

    def _ordered(self, room: Room) -> list[int]:
        """Layers whose experts are faster on the device, most seconds saved per byte first, of equals the later.

        The order is that of plain decode, so that it is the same however the rest is chosen.
        """
        if room.name not in self._order:
            always = self.n_away is not None or self._is_short
            worth: dict[int, float] = {}
            for kind in set(self._sizes.kinds):
                layer = self._layers[kind]
                if layer.expert_tensors and (always or self._gain(room, layer) > 0):
                    worth[kind] = self.costs.saved_per_byte(room.name, layer)
            last = len(self._layers) - 1  # a prompt hardly uses its experts, so they come after their equals
            moe = [(worth[kind], i != last, i) for i, kind in enumerate(self._sizes.kinds) if kind in worth]
            self._order[room.name] = [index for _, _, index in sorted(moe, reverse=True)]
        return self._order[room.name]

    def _gain(self, room: Room, layer: LayerFacts) -> float:
        gain = self._hop * 2
        for tensor in layer.expert_tensors:
            gain += self._weigh(self.costs.expert(room.name, CPU, layer, tensor))
            gain -= self._weigh(self.costs.expert(room.name, room.name, layer, tensor))
        return gain

    @property
    def _is_short(self) -> bool:
        """Whether RAM cannot hold the model: then whatever a GPU takes is saved from the disk."""
        return self.costs.facts.total_bytes > self.costs.machine.ram_free_bytes


def _all_splits(n: int, n_devices: int) -> Iterator[list[int]]:
    """Every way to share n layers among devices, in order."""
    if n_devices == 1:
        yield [n]
        return
    for first in range(n + 1):
        for rest in _all_splits(n - first, n_devices - 1):
            yield [first, *rest]
