"""Predictions corrected by what was measured when the model ran here. Pure.

    history = Calibration(facts, machine, runs)
    plan = make_plan(facts, machine, request, history)

A run that was kept has its setting and its own counts of tokens. Its measured seconds over those that the cost model
computes for the same counts are a factor, and a setting's correction is the median of its latest runs' factors. A
setting that never ran borrows the factor of the most similar one that did: so no choice hangs on what happened to be
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import log2
from typing import NamedTuple

from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts
from moelocal.model.kv import KVType
from moelocal.plan.cost import UNCORRECTED, Correction, Costs, Placement, Prediction, Setting, Work, predict, prediction
from moelocal.plan.memory import Sizes
from moelocal.plan.request import PlanRequest, bounded
from moelocal.units import format_bytes

_LEAST_DECODED, _LEAST_COMPUTED = 4, 8  # tokens: fewer say nothing about a speed
_GOOD_DECODED, _GOOD_COMPUTED = 16, 32  # enough, however fast
_LONG_S = 0.1  # a shorter prompt tells something if it takes so long
_BUSY = 4.0  # times the computed seconds: then the computer had something else to do
_LATEST = 5  # runs of one setting
_MOST = 1e7  # of whatever is measured; more is damage
_SHORT = 256  # tokens: depths far below it cost the same


class Difference(NamedTuple):
    """A device where llama.cpp took another amount of memory than planned."""

    name: str
    planned_bytes: int
    allocated_bytes: int


class Run(NamedTuple):
    """What one answer, or one benchmark, measured: `n_prompt` tokens of prompt computed in `prompt_s`, `n_decoded`
    tokens in `decode_s` with `n_depth` in the cache on average. `ram_bytes`: how much RAM the plan might use. No
    `prompt_s`, and no `first_token_s`, for an answer that was cut short."""

    setting: Setting
    ram_bytes: int
    n_prompt: int
    prompt_s: float
    first_token_s: float
    n_depth: int
    n_decoded: int
    decode_s: float
    load_s: float
    differences: tuple[Difference, ...] = ()

    @property
    def has_decode(self) -> bool:
        """Whether enough was generated to tell its speed."""
        return self.n_decoded >= _LEAST_DECODED and 0 < self.decode_s < _MOST

    @property
    def has_prefill(self) -> bool:
        """Whether enough of a prompt was computed to tell its speed."""
        enough = self.n_prompt >= (_LEAST_COMPUTED if self.prompt_s >= _LONG_S else _GOOD_COMPUTED)
        return enough and 0 < self.prompt_s < _MOST

    @property
    def is_good(self) -> bool:
        """Whether its decode is a fair sample."""
        return self.n_decoded >= _GOOD_DECODED

    @property
    def is_whole(self) -> bool:
        """Whether it can be shown: an answer to its end."""
        return self.has_decode and self.n_prompt > 0 and 0 < self.prompt_s < _MOST


class _Kind(NamedTuple):
    """What speed depends on, the most important first; all but which layers are where."""

    devices: frozenset[str]
    repack: bool
    load_mode: str
    threads: int
    kv_type: str
    n_ubatch: int

    @classmethod
    def of(cls, work: Work | Setting, placement: Placement) -> _Kind:
        devices = {*placement.layers, *placement.experts, placement.output, *(name for _, name in placement.parts)}
        return cls(frozenset(devices), work.repack, work.load_mode, work.threads, work.kv_type, work.n_ubatch)

    def distance(self, other: _Kind) -> tuple[bool, ...]:
        """How different another one is: smaller is more alike."""
        return tuple(mine != theirs for mine, theirs in zip(self, other, strict=True))


class Calibration:
    """What the runs of one model on one machine teach. `runs`: the oldest first; those of devices that are not there
    any more do not count."""

    def __init__(self, facts: ModelFacts, machine: Machine, runs: Sequence[Run]) -> None:
        self._facts, self._machine = facts, bounded(machine, PlanRequest())
        self._runs = [(_Kind.of(run.setting, run.setting.placement), run) for run in runs if self._is_possible(run)]
        self._factors: dict[int, Correction] = {}
        self._known: dict[tuple[_Kind, int, int], Correction] = {}
        self._sized: dict[tuple[int, KVType, int], Sizes] = {}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def _is_possible(self, run: Run) -> bool:
        setting, there = run.setting, {device.name for device in self._machine.devices}
        placement, n_layers = setting.placement, len(self._facts.layers)
        lengths = {len(placement.layers), len(placement.experts)} == {n_layers}
        amounts = setting.n_ctx > 0 and setting.n_ubatch > 0 and setting.threads > 0
        is_kv_type = setting.kv_type in ("f16", "q8_0", "q4_0") and self._facts.fits_kv_type(setting.kv_type)
        return lengths and amounts and is_kv_type and _Kind.of(setting, placement).devices <= there

    def correction(self, work: Work, placement: Placement) -> Correction:
        """How far the computed seconds are off for this work: by the runs most like it."""
        kind = _Kind.of(work, placement)
        key = kind, work.n_prompt, work.n_depth
        if key not in self._known:
            decodes, prefills = self._decodes(kind, work.n_depth), self._prefills(kind, work.n_prompt)
            self._known[key] = Correction(
                median(self._factor(run).decode for run in decodes) if decodes else 1.0,
                median(self._factor(run).prefill for run in prefills) if prefills else 1.0,
            )
        return self._known[key]

    def _decodes(self, kind: _Kind, n_depth: int) -> list[Run]:
        nearest = _nearest(kind, [pair for pair in self._runs if pair[1].has_decode])
        good = [run for run in nearest if run.is_good]
        return _alike(good or nearest, n_depth + _SHORT, lambda run: run.n_depth + _SHORT)

    def _prefills(self, kind: _Kind, n_prompt: int) -> list[Run]:
        nearest = _nearest(kind, self._with_prefill)
        return _alike(nearest, n_prompt, lambda run: run.n_prompt)

    @cached_property
    def _with_prefill(self) -> list[tuple[_Kind, Run]]:
        """Runs whose prompt took long because there was much to compute, and not because the computer was busy."""

        def is_long(run: Run) -> bool:
            return run.n_prompt >= _GOOD_COMPUTED or self._factor(run).prefill < _BUSY

        return [(kind, run) for kind, run in self._runs if run.has_prefill and is_long(run)]

    def _factor(self, run: Run) -> Correction:
        """Measured seconds over those computed for the very same tokens."""
        if id(run) not in self._factors:
            self._factors[id(run)] = self._factor_of(run)
        return self._factors[id(run)]

    def _factor_of(self, run: Run) -> Correction:
        told = self.predict_for(run, UNCORRECTED)
        decode = run.decode_s / run.n_decoded * told.decode_per_s if run.has_decode else 1.0
        prefill = run.prompt_s / run.n_prompt * told.prefill_per_s if run.has_prefill else 1.0
        return Correction(decode, prefill)

    def predict(self, setting: Setting, ram_bytes: int, n_prompt: int, n_depth: int) -> Prediction:
        """What a plan with this setting and so much RAM predicts for these counts of tokens."""
        here = replace(self._machine, ram_free_bytes=ram_bytes)
        correction = self.correction(_work(setting, n_prompt, n_depth), setting.placement)
        return predict(self._facts, here, setting, n_prompt, n_depth, correction)

    def predict_for(self, run: Run, correction: Correction) -> Prediction:
        """What the cost model says of a run's own setting and tokens."""
        setting, n_prompt = run.setting, max(1, run.n_prompt)
        then = replace(self._machine, ram_free_bytes=run.ram_bytes)
        costs = Costs(self._facts, then, _work(setting, n_prompt, run.n_depth))
        return prediction(costs.total(setting.placement, self._sizes(setting)).corrected(correction), n_prompt)

    def _sizes(self, setting: Setting) -> Sizes:
        """What the cost of a model larger than RAM depends on. Contexts of about one size have the same: it takes
        longer to compute than all the rest."""
        n_ctx = 1 << (setting.n_ctx - 1).bit_length()
        key = n_ctx, setting.kv_type, setting.n_ubatch
        if key not in self._sized:
            self._sized[key] = Sizes.of(self._facts, *key)
        return self._sized[key]

    def measured(self, setting: Setting) -> Prediction | None:
        """Medians of the latest answers with this setting, else of the most similar one that ran."""
        runs = self._shown(setting)
        if not runs:
            return None
        good = [run for run in runs if run.has_prefill] or runs
        return Prediction(
            1 / median(run.decode_s / run.n_decoded for run in runs),
            1 / median(run.prompt_s / run.n_prompt for run in good),
            median(run.first_token_s for run in runs),
            median(run.load_s for run in runs),
        )

    def _shown(self, setting: Setting) -> list[Run]:
        kind = _Kind.of(setting, setting.placement)
        nearest = _nearest(kind, [pair for pair in self._runs if pair[1].is_whole])
        return ([run for run in nearest if run.is_good] or nearest)[-_LATEST:]

    def sentences(self, setting: Setting, n_prompt: int, n_depth: int) -> Iterator[str]:
        """What to know about corrected predictions of a plan with this setting and this work."""
        work = _work(setting, n_prompt, n_depth)
        kind = _Kind.of(setting, setting.placement)
        decodes, prefills = self._decodes(kind, n_depth), self._prefills(kind, n_prompt)
        if decodes or prefills:
            by = self.correction(work, setting.placement)
            parts = [f"{by.decode:.2f} times the computed time for an answer"] if decodes else []
            parts += [f"{by.prefill:.2f} times for a prompt"] if prefills else []
            n = len({id(run) for run in (*decodes, *prefills)})
            yield f"Predicted speeds are corrected by {_count(n)} measured here: {', '.join(parts)}"
        if shown := self._shown(setting):
            yield from self._about(shown, setting)
        if self._runs:
            for name, planned, allocated in self._runs[-1][1].differences:
                yield (
                    f"In the last run here llama.cpp took {format_bytes(allocated)} on {name} where "
                    f"{format_bytes(planned)} were planned"
                )

    def _about(self, shown: list[Run], setting: Setting) -> Iterator[str]:
        """What the measured row is about, and what the corrected model says of the same tokens."""
        last = shown[-1]
        work = _work(last.setting, max(1, last.n_prompt), last.n_depth)
        told = self.predict_for(last, self.correction(work, last.setting.placement))
        odd = _different(last.setting, setting)
        yield (
            f"Measured: {_count(len(shown))}{f' with {odd}' if odd else ''}, the last with {last.n_prompt:,} tokens of "
            f"prompt and {last.n_depth:,} in the context; for those the prediction is {told.decode_per_s:.1f} tokens/s"
        )


def _work(setting: Setting, n_prompt: int, n_depth: int) -> Work:
    return Work(
        setting.kv_type, setting.n_ubatch, setting.threads, setting.repack, setting.load_mode, n_prompt, n_depth
    )


def _nearest(kind: _Kind, runs: list[tuple[_Kind, Run]]) -> list[Run]:
    """The runs of the setting most like this one: all of one kind, the oldest first."""
    best = min((its for its, _ in reversed(runs)), key=kind.distance, default=None)
    return [run for its, run in runs if its == best]


def _alike(runs: list[Run], wanted: int, count: Callable[[Run], int]) -> list[Run]:
    """The few whose counts of tokens are nearest, by powers of two; of equals the latest."""
    latest_first = runs[::-1]
    return sorted(latest_first, key=lambda run: round(abs(log2(count(run) / max(1, wanted)))))[:_LATEST]


def median(values: Iterable[float]) -> float:
    """The middle one; of two middle ones the smaller, since what disturbs a measurement makes it longer."""
    found = sorted(values)
    return found[(len(found) - 1) // 2]


def _count(n: int) -> str:
    return f"{n} runs" if n != 1 else "1 run"


def _different(run: Setting, now: Setting) -> str:
    """In what way a measured setting is not that of the plan; empty when it is the same."""
    parts = []
    there, here = _Kind.of(run, run.placement), _Kind.of(now, now.placement)
    if there.devices != here.devices:
        parts.append(f"the model on {', '.join(sorted(there.devices))}")
    if run.repack != now.repack:
        parts.append("weights repacked" if run.repack else "weights not repacked")
    if run.load_mode != now.load_mode:
        parts.append("weights mapped" if run.load_mode == "mmap" else "weights loaded, not mapped")
    if run.threads != now.threads:
        parts.append(f"{run.threads} threads")
    if run.kv_type != now.kv_type:
        parts.append(f"a KV cache of {run.kv_type}")
    if run.n_ubatch != now.n_ubatch:
        parts.append(f"batches of {run.n_ubatch:,}")
    return ", ".join(parts)
