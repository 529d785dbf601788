"""Where llama.cpp's own `--fit` would put everything, for a context that is given: one more candidate. Pure.

So no plan is slower than what people have without one. The rules: what every token uses goes on the GPUs from the last
layer back, then such layers become whole ones in front, device by device; one more layer per device in part, the rest
of it on the next device; 1 GiB stays free. Memory is as our arithmetic has it. Where `--fit` would push a router off
the GPU (its patterns do), the router stays here.

Source: llama.cpp 0c1e57098, common/fit.cpp, common_params_fit_impl.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts
from moelocal.plan.cost import Placement
from moelocal.plan.memory import CPU, Sizes, placed

MARGIN_BYTES = 1 << 30
_KEPT = {"up": ("ffn_up_",), "gate": ("ffn_up_", "ffn_gate_exps"), "attn": ()}  # expert tensors that stay, by fraction


class _Share(NamedTuple):
    """A device's layers, how many of them are without their experts, and what of the first such one overflows where."""

    n_layer: int = 0
    n_part: int = 0
    overflow: Literal["moe", "up", "gate", "attn"] = "moe"
    target: str = CPU


def fit_layout(facts: ModelFacts, machine: Machine, sizes: Sizes, free_bytes: tuple[int, ...]) -> Placement | None:
    """What `--fit` makes of a machine whose GPUs have so many bytes free; None without a GPU."""
    return _Fit(facts, machine, sizes, free_bytes).layout() if machine.gpus else None


class _Fit:
    def __init__(self, facts: ModelFacts, machine: Machine, sizes: Sizes, free_bytes: tuple[int, ...]) -> None:
        self.facts, self.machine, self.sizes = facts, machine, sizes
        self.names = [device.name for device in machine.gpus]
        self.free = free_bytes
        self.n_all = len(facts.layers) + 1  # the output head counts as a layer

    def layout(self) -> Placement:
        """The layout that `--fit` ends with."""
        full = self._all_full()
        if self._over(full, range(len(self.names))) <= 0:
            return full
        shares = self._dense_only()
        bare = Placement(full.layers, (CPU,) * len(full.layers), full.output)
        left = -sum(self._over(bare, [i]) for i in range(len(self.names)))
        return self._placement(self._filled(shares) if self.facts.is_moe and left > 0 else shares)

    def _over(self, placement: Placement, indices: range | list[int]) -> int:
        """By how many bytes the fullest of these devices is above its target."""
        uses = placed(self.facts, self.machine, placement, self.sizes)
        used = [uses[name].total_bytes if name in uses else 0 for name in self.names]
        return max(used[i] + MARGIN_BYTES - self.free[i] for i in indices)

    def _fits(self, shares: list[_Share], *indices: int) -> bool:
        return self._over(self._placement(shares), list(indices)) <= 0

    def _all_full(self) -> Placement:
        """Without any limit: layers split by free memory."""
        total, sums = sum(self.free), [sum(self.free[: i + 1]) for i in range(len(self.free))]
        homes = [
            self.names[next(d for d, held in enumerate(sums) if il / self.n_all < held / total)]
            for il in range(self.n_all)
        ]
        return Placement(tuple(homes[:-1]), tuple(homes[:-1]), homes[-1])

    def _dense_only(self) -> list[_Share]:
        """From the last device back, as many layers as it holds without their experts."""
        last, is_moe = len(self.names) - 1, self.facts.is_moe
        shares = [_Share() for _ in self.names]

        def trial(i: int, n: int) -> list[_Share]:
            part = (n if i < last else max(0, n - 1)) if is_moe else 0
            return [*shares[:i], _Share(n, part), *shares[i + 1 :]]

        for i in reversed(range(last + 1)):
            most = self.n_all - sum(share.n_layer for share in shares)
            found = next((n for n in range(most, 0, -1) if self._fits(trial(i, n), i)), 0)
            shares = trial(i, found)
        return shares

    def _filled(self, shares: list[_Share]) -> list[_Share]:
        """Layers without experts, from the back, become whole ones in front."""
        last = len(shares) - 1
        start = next((i for i in range(len(shares)) if all(share.n_layer for share in shares[i:])), len(shares))
        for i in range(len(shares)):
            if i > start or start == len(shares):
                break
            before, since = shares, start
            for n in range(1, 1 + sum(share.n_part for share in before[since:])):
                trial, at = _converted(before, i, since, n)
                if not self._fits(trial, i):
                    break
                shares, start = trial, at
            if shares[start].n_layer > (0 if i < last else 1) and shares[start].n_part:
                shares, start = self._one_more(shares, i, start)
        return shares

    def _one_more(self, shares: list[_Share], i: int, start: int) -> tuple[list[_Share], int]:
        """One more layer for device i, of whose experts it holds a part."""
        last, base = len(shares) - 1, [*shares]
        base[start] = base[start]._replace(n_layer=base[start].n_layer - 1, n_part=base[start].n_part - 1)
        base[i] = base[i]._replace(n_layer=base[i].n_layer + 1, n_part=base[i].n_part + 1)
        at = start if base[start].n_part else min(start + 1, last)
        target, others = (self.names[i + 1], (i, i + 1)) if i < last else (CPU, (i,))

        def trial(how: Literal["gate", "up", "attn"]) -> list[_Share]:
            return [*base[:i], base[i]._replace(overflow=how, target=target), *base[i + 1 :]]

        if self._fits(trial("up"), *others):
            return trial("gate" if self._fits(trial("gate"), *others) else "up"), at
        return (trial("attn"), at) if self._fits(trial("attn"), *others) else (shares, start)

    def _placement(self, shares: list[_Share]) -> Placement:
        n_layers = self.n_all - 1
        at = self.n_all - sum(share.n_layer for share in shares)
        homes, experts = [CPU] * self.n_all, [CPU] * self.n_all
        parts: list[tuple[str, str]] = []
        for name, share in zip(self.names, shares, strict=True):
            homes[at : at + share.n_layer] = [name] * share.n_layer
            first = at + share.n_layer - share.n_part
            experts[at:first] = [name] * (first - at)
            for index in range(first, min(at + share.n_layer, n_layers)):
                tensors = self.facts.layers[index].expert_tensors
                experts[index] = (share.target if index == first else CPU) if tensors else name
                if index == first and share.overflow in _KEPT:
                    kept = tuple(f"blk.{index}.{stem}" for stem in _KEPT[share.overflow])
                    parts += [(tensor.name, name) for tensor in tensors if kept and tensor.name.startswith(kept)]
            at += share.n_layer
        return Placement(tuple(homes[:-1]), tuple(experts[:-1]), homes[-1], tuple(parts))


def _converted(shares: list[_Share], i: int, start: int, n: int) -> tuple[list[_Share], int]:
    """So many layers without experts become whole layers of device i; and the device that gives the next one."""
    made, last = [*shares], len(shares) - 1
    at = start
    while at <= last:
        taken = min(n, made[at].n_part)
        made[at] = made[at]._replace(n_layer=made[at].n_layer - taken, n_part=made[at].n_part - taken)
        made[i] = made[i]._replace(n_layer=made[i].n_layer + taken)
        n -= taken
        if made[at].n_part:
            break
        at += 1
    return made, min(at, last)
