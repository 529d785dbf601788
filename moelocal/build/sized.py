"""`quantize` within a size: which types the tensors of a file get.

    survey = surveyed(job, threads=2)                         # measures every tensor in every type
    types = chosen(survey, 11 << 30)                          # tensor's name -> type's name
    job = with_types(job, types)

A size is given, or is what the planner can place at once where the model is fastest (`fitting`). With a plan the choice
also counts seconds: of the types that are as good, tensors in RAM get one that the CPU is fast at.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moelocal.build import budget, loss, quantize
from moelocal.build.types import TYPES
from moelocal.errors import BadRequest, OutOfMemory
from moelocal.machine.defaults import default_speeds
from moelocal.machine.hardware import Machine
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import GGUFHeader, TensorInfo, read_header
from moelocal.model.rescale import resized
from moelocal.model.roles import tensor_role
from moelocal.plan.memory import CPU
from moelocal.plan.outcome import outcome_of
from moelocal.plan.planner import Plan, make_plan
from moelocal.plan.refusals import memory_of
from moelocal.plan.request import PlanRequest
from moelocal.units import format_bytes

_REHEARSED = "Q4_0"  # takes any rows of a multiple of 32, wants no importances: shows which tensors may be quantized
_FAIR_BITS, _MOST_BITS = 3.3, 5.0  # per weight; as in plan/choose.py
_HALVINGS = 14
_SHRINK, _N_SHRINKS = 0.99, 20
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file could become: the types that are open, with their sizes and losses; `fixed_bytes`, all the rest of
    the file; `n_values`, all weights; `is_weighted`: with an importance matrix."""

    header: GGUFHeader
    choices: tuple[budget.Choice, ...]
    fixed: Mapping[str, int]
    fixed_bytes: int
    n_values: int
    is_weighted: bool

    @property
    def least_bytes(self) -> int:
        """The smallest file there can be."""
        return self.fixed_bytes + budget.least_bytes(self.choices)

    @property
    def most_bytes(self) -> int:
        """The file that loses least."""
        return self.fixed_bytes + budget.most_bytes(self.choices)

    def tensor(self, name: str) -> TensorInfo:
        """A tensor of the source."""
        return next(tensor for tensor in self.header.tensors if tensor.name == name)


def surveyed(
    job: quantize.QuantizeJob,
    threads: int,
    on_progress: loss.Tell = lambda done, of: None,
    size_bytes: int | None = None,
) -> Survey:
    """Measures what every type would lose of each tensor. Types that the job gives to single tensors stay.

    Args:
        size_bytes: what is aimed at: too little is refused before anything is measured.

    Raises:
        MoelocalError: the job makes no sense, or the source cannot be read.
    """
    if job.keep_split:
        raise BadRequest("A budget is for one file, not for shards.", "Leave out --keep-split.")
    planned = quantize.preview(replace(job, type_name=_REHEARSED))
    if planned.refusal is not None:
        raise planned.refusal
    header = read_header(job.source)
    imatrix = None
    if job.imatrix is not None:
        from moelocal.build import imatrix_file

        imatrix = imatrix_file.read(job.imatrix)
    known = {tensor.name: tensor for tensor in header.tensors}
    fixed = {change.name: change.after for change in planned.changes if not _is_open(job, change)}
    tensors = [known[change.name] for change in planned.changes if change.name not in fixed]
    rehearsed = sum(-(-c.bytes_after // 32) * 32 for c in planned.changes if c.name not in fixed)
    n_values = sum(change.n_values for change in planned.changes)
    weighted = set() if imatrix is None else set(imatrix.entries)
    unmeasured = tuple(_choice(t, dict.fromkeys(loss.candidates(t, t.name in weighted), 0.0)) for t in tensors)
    survey = Survey(header, unmeasured, fixed, planned.file_bytes - rehearsed, n_values, imatrix is not None)
    if size_bytes is not None:
        check_size(survey, size_bytes)
    errors = loss.measure(header, tensors, imatrix, threads, on_progress)
    return replace(survey, choices=tuple(_choice(tensor, errors[tensor.name]) for tensor in tensors))


def _is_open(job: quantize.QuantizeJob, change: quantize.TensorChange) -> bool:
    """Whether the budget may choose a tensor's type."""
    if GGML_TYPES[change.after].block_size == 1 or any(re.search(pattern, change.name) for pattern, _ in job.patterns):
        return False
    role = tensor_role(change.name)[1]
    return not ((job.output_type and role == "output") or (job.embedding_type and role == "embedding"))


def _choice(tensor: TensorInfo, errors: loss.Errors) -> budget.Choice:
    weight = loss.sensitivity(tensor.name)
    options = [budget.Option(one, loss.type_bytes(tensor, one), weight * error) for one, error in errors.items()]
    return budget.Choice(tensor.name, tuple(options))


def check_size(survey: Survey, size_bytes: int) -> None:
    """Whether a file of that size can be made.

    Raises:
        BadRequest: it would be too small, with the least size.
    """
    if size_bytes >= survey.least_bytes:
        return
    least = f"{math.ceil(survey.least_bytes / _MIB)}MiB"
    smaller = "" if survey.is_weighted else "; with an importance matrix less (see moelocal imatrix)"
    raise BadRequest(
        f"{format_bytes(size_bytes)} is too little: the smallest file of this model takes "
        f"{format_bytes(survey.least_bytes)}.",
        f"Give at least --size {least}{smaller}.",
    )


def chosen(survey: Survey, size_bytes: int, costs: Mapping[tuple[str, int], float] | None = None) -> dict[str, int]:
    """The types (of `GGML_TYPES`) with the least loss whose file takes at most `size_bytes`.

    Args:
        costs: seconds of a token by tensor and type. Then the sum of loss and seconds is least, each relative to what
            the choice without seconds gives: 1 % more loss is worth 1 % fewer seconds.

    Raises:
        BadRequest: no choice is so small.
    """
    check_size(survey, size_bytes)
    room = size_bytes - survey.fixed_bytes
    types = budget.choose(survey.choices, room)
    if not costs:
        return types
    _, least = budget.total(survey.choices, types)
    seconds = sum(costs.get(pair, 0.0) for pair in types.items())
    if least <= 0 or seconds <= 0:
        return types
    return budget.choose(budget.with_costs(survey.choices, costs, least / seconds), room)


def with_types(job: quantize.QuantizeJob, types: Mapping[str, int]) -> quantize.QuantizeJob:
    """The job that makes a choice. The file is named after the type of most bytes."""
    held = Counter[str]()
    for tensor in read_header(job.source).tensors:
        if tensor.name in types:
            held[GGML_TYPES[types[tensor.name]].name] += loss.type_bytes(tensor, types[tensor.name])
    main = held.most_common(1)[0][0] if held else _REHEARSED
    name = next(kind.name for kind in TYPES.values() if kind.main == main)
    return replace(job, type_name=name, tensor_types={n: GGML_TYPES[one].name for n, one in types.items()})


def facts_of(survey: Survey, types: Mapping[str, int]) -> ModelFacts:
    """The model that a choice would make."""
    after = {**survey.fixed, **types}
    made = tuple(
        t._replace(ggml_type=after[t.name], n_bytes=loss.type_bytes(t, after[t.name])) for t in survey.header.tensors
    )
    size = survey.fixed_bytes + sum(t.n_bytes for t in made if t.name in types)
    return read_facts(replace(survey.header, tensors=made, file_bytes=size))


def fitting(survey: Survey, machine: Machine, request: PlanRequest) -> tuple[int, str]:
    """The size to aim at on a machine, and why: the largest file that the GPUs hold, without a GPU the RAM. Where a GPU
    would hold less than three bits per weight, the experts go to RAM, where more than five only take time.

    Raises:
        OutOfMemory: not even the smallest file fits.
    """
    has_gpu = bool(machine.gpus) and not request.cpu_only
    n_ctx = f"{request.n_ctx:,} tokens of context" if request.n_ctx else "its context"
    if has_gpu:
        size = _largest(survey, machine, request, "fits the GPU", survey.most_bytes)
        if size == survey.most_bytes:
            return size, f"the GPU holds it whole in the most exact types, with {n_ctx}"
        if 8 * size >= _FAIR_BITS * survey.n_values:
            return size, f"the largest that the GPU holds whole, with {n_ctx}"
    cap = int(_MOST_BITS * survey.n_values / 8) if has_gpu else survey.most_bytes
    size = _largest(survey, machine, request, None, min(survey.most_bytes, max(cap, survey.least_bytes)))
    if not size:
        raise OutOfMemory(
            f"The smallest file of this model takes {format_bytes(survey.least_bytes)}, and with {n_ctx} and what "
            f"computing takes {memory_of(machine, request)} cannot hold that.",
            "Free memory, give a smaller --ctx, or drop experts first: moelocal prune MODEL --keep 75%",
        )
    if has_gpu:
        return size, f"the GPU would hold less than three bits per weight of it; with experts in RAM, and {n_ctx}"
    largest = "the RAM holds it in the most exact types" if size == survey.most_bytes else "the largest the RAM holds"
    return size, f"{largest}, with {n_ctx}"


def _largest(survey: Survey, machine: Machine, request: PlanRequest, kind: str | None, most: int) -> int:
    """The largest file whose plan has all of it in memory (of that kind of outcome); 0: none has."""

    def fits(facts: ModelFacts) -> bool:
        try:
            plan = make_plan(facts, machine, request)
        except OutOfMemory:
            return False
        return plan.fits and (kind is None or outcome_of(plan).kind == kind)

    def sketched(size: int) -> bool:
        return fits(read_facts(resized(survey.header, "Q4_K_M", size)))

    low, high = survey.least_bytes, most
    if sketched(high):
        low = high
    elif not sketched(low):
        return 0
    for _ in range(_HALVINGS if low < high else 0):
        middle = (low + high) // 2
        low, high = (middle, high) if sketched(middle) else (low, middle)
    for _ in range(_N_SHRINKS):  # a plan of the true types may need a little more than the sketch
        if fits(facts_of(survey, chosen(survey, low))):
            return low
        low = max(survey.least_bytes, int(low * _SHRINK))
    return 0


def seconds_in_ram(
    survey: Survey, machine: Machine, types: Mapping[str, int], request: PlanRequest
) -> dict[tuple[str, int], float]:
    """What one token takes of each tensor that the plan of a choice puts into RAM, by tensor and type.

    Raises:
        OutOfMemory: there is no plan.
    """
    facts = facts_of(survey, types)
    plan = make_plan(facts, machine, request)
    cpu = next(device for device in machine.devices if device.kind == "cpu")
    speeds = machine.speeds.devices.get(cpu.name) or default_speeds(cpu, machine.cpu)
    share = facts.n_experts_used / facts.n_experts if facts.n_experts else 1.0
    found = {}
    for choice in survey.choices:
        role = tensor_role(choice.name)[1]
        if role == "embedding" or _device(plan, facts, choice.name) != CPU:
            continue
        is_expert = role == "routed_expert"
        table = speeds.expert if is_expert else speeds.dense
        for option in choice.options:
            name = GGML_TYPES[option.ggml_type].name
            rates = [table[name, packed] for packed in (False, plan.repack) if (name, packed) in table]
            if rates:
                rate = max(one.decode_bytes_per_s for one in rates)
                n_bytes = option.n_bytes * (share if is_expert else 1.0)
                found[choice.name, option.ggml_type] = n_bytes / rate
    return found


def _device(plan: Plan, facts: ModelFacts, name: str) -> str:
    """Where a plan puts a tensor."""
    assert plan.placement is not None
    layer, role = tensor_role(name)
    at = next((i for i, one in enumerate(facts.layers) if one.index == layer), None)
    if at is None:
        return plan.placement.output
    if role == "routed_expert":
        return plan.placement.moved().get(at, {}).get(name, plan.placement.experts[at])
    return plan.placement.layers[at]
