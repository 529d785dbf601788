"""Which quantization of a model to take for a machine: each is planned, the most exact that is fast enough wins. Pure.

    choice = choose(candidates, machine, PlanRequest(objective="chat"))
    choice.best.label, choice.reason, choice.neighbours

Fast enough is what the objective is for: an answer faster than anyone reads, a long prompt read in half a minute, most
of the speed there is. Beyond 7.5 bits per weight nothing is gained that could be noticed, so that must cost next to
nothing; below 4 bits quality goes quickly, so that is for machines where nothing else fits or answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moelocal.errors import OutOfMemory
from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts
from moelocal.plan.planner import Plan, make_plan
from moelocal.plan.request import PlanRequest
from moelocal.units import format_bytes

_GOOD_BITS, _FAIR_BITS, _LEAST_BITS = 4.2, 3.3, 2.5  # four, three, two bits, as quantizations of MoE models are
_FINE_BITS, _MOST_BITS = 7.5, 9.5  # a Q6_K whose odd tensors had to become Q8_0 stays below
_UNNOTICED_BITS = 6.0  # above, one step more brings nothing to be noticed
_FOUR_BITS = 5.0  # the most that a quantization of the four-bit kind takes
_GOOD_PER_S = 20.0  # chat: a model that thinks before it answers is then still no pain
_GOOD_FIRST_S, _GOOD_LONG_PER_S = 30.0, 10.0  # long prompts: until the first token, and the answer
_GOOD_SHARE = 0.7  # throughput: of what the fastest gives
_ENOUGH, _SLOW = 0.4, 0.2  # of what is good: in a chat 8 tokens/s, somewhat faster than people read; and 4
_FREE = 0.9  # a better quantization that keeps so much of the speed costs nothing
_LEAST_N_CTX = {"chat": 4096, "long-prompt": 16384, "throughput": 4096}


class Candidate(NamedTuple):
    """A file, or a split model, that could be taken."""

    label: str
    n_bytes: int
    facts: ModelFacts
    missing_bytes: int | None = None  # still to come; None: all of it


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate as it would run here. `bits` are per weight; `pace` is its speed, where 1 is good for the objective;
    `why_not` is what rules it out. Without a plan it does not run at all."""

    label: str
    n_bytes: int
    bits: float
    plan: Plan | None = None
    pace: float = 0.0
    why_not: str = ""

    @property
    def fits(self) -> bool:
        """Whether it may be chosen."""
        return not self.why_not


@dataclass(frozen=True, slots=True)
class Choice:
    """The options, the least exact first; the best, if any fits; why, and what the ones beside it would give."""

    options: tuple[Option, ...]
    best: Option | None
    reason: str
    neighbours: tuple[str, ...] = ()


def choose(
    candidates: Sequence[Candidate], machine: Machine, request: PlanRequest, room_bytes: int | None = None
) -> Choice:
    """Plans every candidate and takes the best one; never one that does not fit.

    Args:
        room_bytes: what the disk has room for; None: not known.
    """
    sizes = sorted(candidates, key=lambda one: (one.n_bytes, one.label))
    options = tuple(_paced([_planned(one, machine, request, room_bytes) for one in sizes], request))
    fitting = [option for option in options if option.fits]
    if not fitting:
        return Choice(options, None, _hopeless(options))
    best, reason = _best(fitting, request)
    return Choice(options, best, reason, tuple(_neighbours(options, best)))


def _planned(one: Candidate, machine: Machine, request: PlanRequest, room_bytes: int | None) -> Option:
    """A candidate with its plan, or why there is none."""
    bits = 8 * one.n_bytes / max(1, one.facts.total_params)
    memory = machine.ram_free_bytes + sum(device.free_bytes for device in machine.gpus if not device.shares_ram)
    if one.n_bytes > memory:
        missing = format_bytes(one.n_bytes - memory)
        return Option(one.label, one.n_bytes, bits, why_not=f"{missing} more than memory holds")
    try:
        plan = make_plan(one.facts, machine, request)
    except OutOfMemory:
        return Option(one.label, one.n_bytes, bits, why_not="more than memory holds")
    why_not = ""
    if not plan.fits:
        why_not = f"{format_bytes(plan.disk_bytes)} more than memory holds"
    elif plan.n_ctx < min(_LEAST_N_CTX[request.objective], request.n_ctx or one.facts.n_ctx_train or plan.n_ctx):
        why_not = f"room for {plan.n_ctx:,} tokens of context only"
    to_come = one.n_bytes if one.missing_bytes is None else one.missing_bytes
    if not why_not and room_bytes is not None and to_come > room_bytes:
        why_not = f"{format_bytes(to_come - room_bytes)} more than the disk has room for"
    return Option(one.label, one.n_bytes, bits, plan, why_not=why_not)


def _paced(options: list[Option], request: PlanRequest) -> list[Option]:
    """Options with their pace."""
    fitting = [option for option in options if option.fits]
    compared = [option for option in fitting if option.bits >= _GOOD_BITS] or fitting
    rates = [_turn_rate(option.plan) for option in compared]
    return [
        Option(one.label, one.n_bytes, one.bits, one.plan, _pace(one.plan, request, max(rates, default=1)), one.why_not)
        for one in options
    ]


def _pace(plan: Plan | None, request: PlanRequest, fastest: float) -> float:
    if plan is None or plan.predicted is None:
        return 0.0
    speeds = plan.predicted
    if request.objective == "chat":
        return speeds.decode_per_s / _GOOD_PER_S
    if request.objective == "long-prompt":
        first_s = _first_s(plan)
        return min(_GOOD_FIRST_S / max(first_s, 1e-9), speeds.decode_per_s / _GOOD_LONG_PER_S)
    return _turn_rate(plan) / (fastest * _GOOD_SHARE)


def _first_s(plan: Plan) -> float:
    """Seconds until the first token of an answer to the objective's prompt."""
    return plan.predicted.first_token_s if plan.predicted else float("inf")


def _turn_rate(plan: Plan | None) -> float:
    """Tokens per second over prompt and answer alike."""
    if plan is None or plan.predicted is None:
        return 0.0
    return 2 / (1 / max(plan.predicted.prefill_per_s, 1e-9) + 1 / max(plan.predicted.decode_per_s, 1e-9))


def _best(fitting: list[Option], request: PlanRequest) -> tuple[Option, str]:
    """The best of those that fit, and why. `fitting`: the least exact first."""
    solid = [option for option in fitting if option.bits >= _GOOD_BITS]
    fast = [option for option in solid if option.pace >= 1]
    if fast:
        found = max((one for one in fast if one.bits < _FINE_BITS), key=_quality, default=fast[0])
        finer = [one for one in fast if found.bits < one.bits < _MOST_BITS and one.pace >= _FREE * found.pace]
        found = max([found, *finer], key=_quality)
        if all(one.bits <= found.bits for one in fast):
            return found, f"the most exact one that {_is_good(request)}"
        return found, f"it {_is_good(request)}, and more exact ones bring no gain to be noticed"
    enough = [option for option in solid if option.pace >= _ENOUGH]
    if enough:
        small = [one for one in enough if one.bits <= _FOUR_BITS]
        found = max(small, key=_quality) if small else max(enough, key=lambda one: one.pace)
        return found, f"nothing {_is_good(request)} here, and four bits are where larger ones only get slower"
    fair = [option for option in fitting if option.bits >= _FAIR_BITS and option.pace >= _ENOUGH]
    if fair:
        return max(
            fair, key=_quality
        ), "with four bits nothing here answers as fast as people read; with three bits it does"
    slow = [option for option in fitting if option.bits >= _FAIR_BITS and option.pace >= _SLOW]
    if slow:
        kept = [option for option in slow if option in solid] or slow
        return max(kept, key=lambda one: one.pace), "nothing good is fast here; this is the fastest that still is good"
    rough = [option for option in fitting if option.bits >= _LEAST_BITS and option.pace >= _ENOUGH]
    if rough:
        return max(rough, key=_quality), "the most exact one that fits and answers as fast as people read"
    best_pace = max(option.pace for option in fitting)
    usable = [one for one in fitting if one.pace >= best_pace / 2 and _LEAST_BITS <= one.bits <= _FOUR_BITS]
    if usable:
        return max(usable, key=_quality), "nothing is fast here; this is the most exact one of up to four bits"
    return max(fitting, key=_quality), "the most exact one that fits"


def _quality(option: Option) -> tuple[float, str]:
    return option.bits, option.label


def _is_good(request: PlanRequest) -> str:
    if request.objective == "chat":
        return f"answers with {_GOOD_PER_S:.0f} tokens/s or more"
    if request.objective == "long-prompt":
        return f"reads a long prompt in {_GOOD_FIRST_S:.0f} s and answers with {_GOOD_LONG_PER_S:.0f} tokens/s"
    return f"keeps {_GOOD_SHARE:.0%} of the highest speed"


def _neighbours(options: Sequence[Option], best: Option) -> list[str]:
    """What one step up and one step down would give."""
    at = options.index(best)
    sentences = []
    if at + 1 < len(options):
        more = options[at + 1]
        sentences.append(f"{more.label}, one step up: {_compared(more, best)}.")
    if at > 0:
        less = options[at - 1]
        sentences.append(f"{less.label}, one step down: {_compared(less, best)}.")
    return sentences


def _compared(other: Option, best: Option) -> str:
    if other.why_not:
        return other.why_not
    if other.plan is None or other.plan.predicted is None or best.plan is None or best.plan.predicted is None:
        return "speed unknown"
    rate, now = other.plan.predicted.decode_per_s, best.plan.predicted.decode_per_s
    size = f"{format_bytes(abs(other.n_bytes - best.n_bytes))} {'more' if other.n_bytes > best.n_bytes else 'less'}"
    gain = ", no gain to be noticed" if min(other.bits, best.bits) >= _UNNOTICED_BITS and other.bits > best.bits else ""
    return f"{_rate(rate)} instead of {_rate(now)} tokens/s, {size}{gain}"


def _rate(per_s: float) -> str:
    return f"{per_s:.0f}" if per_s >= 10 else f"{per_s:.1f}"


def _hopeless(options: Sequence[Option]) -> str:
    if not options:
        return "there is nothing to choose from"
    least = options[0]
    return f"not even the smallest fits, {least.label} of {format_bytes(least.n_bytes)}: {least.why_not}"
