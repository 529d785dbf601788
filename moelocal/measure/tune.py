"""The fastest way to run a model on this machine, found by measuring: `Tuner.run()` yields what it tries.

The planner's choice comes first. Then one thing after another is varied, what costs most first: where weights are and
how they are laid out, threads for decode, threads and batches for prompts, flash attention, the cache's type. Each
variation and the best so far take turns, and only what is faster beyond the noise becomes the best. What the cost model
puts far behind is not tried. In the time that is left, what looked faster within the noise is measured further. At the
end the best and the planner's choice take turns once more.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from moelocal.engine.session import Session
from moelocal.errors import LoadFailed, OutOfMemory
from moelocal.machine.hardware import Machine
from moelocal.measure.duel import Ratio, duel
from moelocal.model.facts import ModelFacts
from moelocal.plan.cost import predict
from moelocal.plan.planner import Plan, make_plan
from moelocal.plan.request import PlanRequest, turn_of

_LEAST_GAIN = 0.01
_KV_GAIN = 0.10  # a coarser cache must save so much
_FAR = 1.6  # times the best's predicted seconds: the cost model is never so wrong
_MOST_PAIRS, _LAST_PAIRS = 7, 5
_MORE_PAIRS, _LIMIT_PAIRS = 4, 23  # of a second look; in all
_LOOKS_SHARE = 0.8  # of the time, for all but the last check
_PROMPTS = (512, 256, 128)
_PROMPT_S = 4.0  # a prompt should not take longer
N_ANSWER = 24
_CPU_UBATCHES, _GPU_UBATCHES = (256, 512, 1024), (512, 1024, 2048, 4096)
_ORDER = ("weights", "threads", "threads_batch", "n_ubatch", "flash_attn", "kv_type")
Fields = dict[str, Any]


class _Trial(NamedTuple):
    """A variation: what is different, whether it shows in prompts and in answers, the gain below which it does not
    matter, and what was measured of it so far."""

    change: Fields
    parts: tuple[bool, bool]
    least_gain: float
    ratio: Ratio | None = None


class Step(NamedTuple):
    """One variation: what is different (fields of a PlanRequest), the ratio of its seconds to the best's so far, and
    whether it is the best now. `ratio` None: it could not be loaded."""

    change: Fields
    ratio: Ratio | None
    is_taken: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What tuning found: fields of a PlanRequest that are better than the planner's choice, none if it is the best;
    how many times as fast a turn is, against that choice; whether everything was tried that could win."""

    fields: Fields
    gain: float
    is_complete: bool


class Tuner:
    """Tunes one model. `load` opens it as a plan says; a session is closed before another one is opened unless RAM
    holds both."""

    def __init__(
        self,
        facts: ModelFacts,
        machine: Machine,
        request: PlanRequest,
        load: Callable[[Plan], Session],
        seconds: float,
    ) -> None:
        self.facts, self.machine = facts, machine
        self._turn = turn_of(request)
        self.n_prompt = _PROMPTS[0]
        self._base = replace(request, n_ctx=request.n_ctx or self._n_ctx())
        self._asked = request
        self._load, start = load, time.monotonic()
        self._deadline, self._last_look = start + seconds, start + _LOOKS_SHARE * seconds
        self._sessions: list[Session] = []
        self._noise = random.Random(0)
        self._is_complete = False
        self._open: list[_Trial] = []  # may be faster
        self.best: Fields = {}
        self.gain = 1.0
        self.tell: Callable[[Fields, int], None] = lambda change, n_done: None
        """Told before each measurement what is varied, and how many measurements of it are done."""

    def _n_ctx(self) -> int:
        return min(self.facts.n_ctx_train or 1 << 20, max(self._turn.n_ctx, 1024))

    def run(self) -> Generator[Step, None, None]:
        """Tries, and yields each step when it is done; `best` is what is known to be best at any time."""
        try:
            self._shorten_prompt()
            is_complete = True
            for name in _ORDER:
                for change in self._candidates(name):
                    if not self._has_time():
                        is_complete = False
                        break
                    least = _KV_GAIN if name == "kv_type" else _LEAST_GAIN
                    yield self._try(_Trial(change, _parts_of(name), least), _MOST_PAIRS)
            yield from self._look_again()
            self._check()
            self._is_complete = is_complete
        finally:
            self.close()

    def outcome(self) -> Outcome:
        """What was found so far."""
        return Outcome(dict(self.best), self.gain, self._is_complete)

    # -- candidates -------------------------------------------------------------------------------------------------

    def _candidates(self, name: str) -> list[Fields]:
        """Variations of the best, the most promising first; none that was asked for otherwise."""
        plan = self.plan(self.best)
        values: Sequence[Any] = ()
        if name == "weights":
            return self._weights(plan)
        if getattr(self._asked, name) is not None:
            return []
        cores, logical = self.machine.cpu.cores, self.machine.cpu.logical_cores or self.machine.cpu.cores
        if name in ("threads", "threads_batch"):
            values = [n for n in (cores - 1, 3 * cores // 4, cores // 2, logical) if 1 <= n <= logical]
            now: Any = plan.threads if name == "threads" else plan.threads_batch or plan.threads
        elif name == "n_ubatch":
            values = [n for n in (_GPU_UBATCHES if self.machine.gpus else _CPU_UBATCHES) if n <= self.n_prompt]
            now = min(plan.n_ubatch, max(values, default=plan.n_ubatch))
        elif name == "flash_attn":
            values, now = (False,), plan.flash_attn
        else:
            values, now = ("q8_0",) if self.facts.fits_kv_type("q8_0") else (), plan.kv_type
        return [{name: value} for value in dict.fromkeys(values) if value != now]

    def _weights(self, plan: Plan) -> list[Fields]:
        """Other layouts and places of the weights, by the seconds that the cost model gives them."""
        changes: list[Fields] = []
        if self._asked.repack is None:
            changes.append({"repack": not plan.repack})
        in_ram = len(plan.expert_layers(self.facts).get("CPU", ()))
        if self.machine.gpus and self._asked.experts_on_cpu is None:
            steps = (-2, -1, 1, 2, len(self.facts.layers) // 8)
            changes += [
                {"experts_on_cpu": in_ram + n} for n in steps if n and 0 <= in_ram + n <= len(self.facts.layers)
            ]
        now = self._predicted_s(plan)
        found: list[tuple[float, Fields]] = []
        for change in changes:
            try:
                other = self.plan(self.best | change)
            except OutOfMemory:
                continue
            if plan.weights != other.weights and (seconds := self._predicted_s(other)) < _FAR * now:
                found.append((seconds, change))
        return [change for _, change in sorted(found, key=lambda pair: pair[0])]

    def plan(self, fields: Fields) -> Plan:
        """The plan with these fields given."""
        return make_plan(self.facts, self.machine, replace(self._base, **fields))

    def _predicted_s(self, plan: Plan) -> float:
        assert plan.setting is not None  # made by make_plan
        told = predict(self.facts, self.machine, plan.setting, self._turn.n_prompt, self._turn.n_prompt)
        return self._turn.n_prompt / told.prefill_per_s + self._turn.n_answer / told.decode_per_s

    # -- measuring --------------------------------------------------------------------------------------------------

    def _has_time(self) -> bool:
        return time.monotonic() < self._deadline

    def _shorten_prompt(self) -> None:
        """So that a measurement does not take too long here; also the first use of the model, which does not count."""
        for n in _PROMPTS[::-1]:
            prompt_s = self.measure(self.plan({}), (n, 0)) * n / self._turn.n_prompt
            if prompt_s * 2 > _PROMPT_S or n == _PROMPTS[0]:
                self.n_prompt = n
                return

    def _try(self, trial: _Trial, n_pairs: int, is_last: bool = False) -> Step:
        """Measures a variation; `is_last`: it will not be measured again, so that what is likely is enough."""
        first, second = self.plan(self.best), self.plan(self.best | trial.change)
        before = trial.ratio.pairs if trial.ratio else ()
        try:
            ratio = self._duel(first, second, trial, len(before) + n_pairs)
        except (LoadFailed, OutOfMemory):
            return Step(trial.change, None, False)
        is_taken = ratio.value < 1 - trial.least_gain and (ratio.is_likely_faster if is_last else ratio.is_faster)
        if is_taken:
            if "threads" in trial.change and self._asked.threads_batch is None:  # else prompts would follow, unmeasured
                self.best = {"threads_batch": first.threads_batch or first.threads} | self.best
            self.best = self.best | trial.change
            self.gain /= ratio.value if all(trial.parts) else 1.0
        elif not is_last and ratio.may_be_faster(trial.least_gain):
            self._open.append(trial._replace(ratio=ratio))
        return Step(trial.change, ratio, is_taken)

    def _look_again(self) -> Generator[Step, None, None]:
        """Measures further what looked faster within the noise, what promises most first."""
        while self._open:
            trial = min(self._open, key=lambda trial: trial.ratio.value if trial.ratio else 1.0)
            self._open.remove(trial)
            n_pairs = trial.ratio.n_pairs if trial.ratio else 0
            is_last = n_pairs + _MORE_PAIRS > _LIMIT_PAIRS or time.monotonic() > self._last_look
            yield self._try(trial, 1 if is_last else _MORE_PAIRS, is_last)

    def _check(self) -> None:
        """The best against the planner's choice, in whole turns; what is not faster is given up."""
        if not self.best:
            return
        ratio = self._duel(self.plan({}), self.plan(self.best), _Trial({}, (True, True), _LEAST_GAIN), _LAST_PAIRS)
        self.gain = 1 / ratio.value
        if ratio.value > 1 - _LEAST_GAIN / 2:
            self.best, self.gain = {}, 1.0

    def _duel(self, first: Plan, second: Plan, trial: _Trial, most: int) -> Ratio:
        """A trial's two plans, with the pairs that were measured before."""
        sizes = (self.n_prompt if trial.parts[0] else 0, N_ANSWER if trial.parts[1] else 0)
        done = itertools.count()

        def measure(plan: Plan) -> float:
            self.tell(trial.change, next(done))
            return self.measure(plan, sizes)

        for plan in (first, second):  # loads, and brings weights in
            self.tell(trial.change, 0)
            self.measure(plan, (min(sizes[0], 32), min(sizes[1], 4)))
        return duel(
            lambda: measure(first),
            lambda: measure(second),
            most,
            trial.least_gain,
            self._has_time,
            trial.ratio.pairs if trial.ratio else (),
        )

    def measure(self, plan: Plan, sizes: tuple[int, int]) -> float:
        """Seconds of a turn's prompt and answer, as (prompt, answer) tokens tell them; 0 tokens: that part is left
        out. An answer is measured behind a prompt that is there already."""
        session = self._session(plan)
        n_prompt, n_answer = sizes
        vocab = range(session.n_vocab)
        seconds = 0.0
        if n_prompt or not session.cached:
            session.rewind(0)
            tokens = [self._noise.choice(vocab) for _ in range(n_prompt or self.n_prompt)]
            start = time.perf_counter()
            session.evaluate(tokens)
            taken = time.perf_counter() - start
            seconds += taken * self._turn.n_prompt / len(tokens) if n_prompt else 0.0
        if n_answer:
            if len(session.cached) + n_answer > session.n_ctx or len(session.cached) > 2 * self.n_prompt:
                session.rewind(min(len(session.cached), self.n_prompt))
            tokens = [self._noise.choice(vocab) for _ in range(n_answer)]
            start = time.perf_counter()
            session.evaluate(tokens, one_by_one=True)
            seconds += (time.perf_counter() - start) * self._turn.n_answer / n_answer
        return seconds

    def _session(self, plan: Plan) -> Session:
        """An open session that runs as planned."""
        for session in self._sessions:
            if session.plan.weights == plan.weights:
                session.run_as(plan)
                return session
        while self._sessions and not (len(self._sessions) < 2 and self._holds_both(plan)):
            self._sessions.pop(0).close()
        self._sessions.append(self._load(plan))
        return self._sessions[-1]

    def _holds_both(self, plan: Plan) -> bool:
        """Whether another copy of the weights fits beside what is open."""
        free = self.machine.ram_free_bytes
        taken = {use.name: use.total_bytes for use in plan.per_device}
        for use in self._sessions[0].plan.per_device:
            taken[use.name] = taken.get(use.name, 0) + use.total_bytes
        budgets = {use.name: use.budget_bytes for use in plan.per_device} | {"CPU": free}
        return all(n_bytes <= 0.9 * budgets.get(name, 0) for name, n_bytes in taken.items())

    def close(self) -> None:
        """Closes what is open."""
        while self._sessions:
            self._sessions.pop().close()


def _parts_of(name: str) -> tuple[bool, bool]:
    """Whether what is varied shows in prompts, in answers."""
    return name != "threads", name not in ("threads_batch", "n_ubatch")
