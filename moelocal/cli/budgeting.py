"""Options of `quantize` for a size instead of a type, and what they make of its job."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from moelocal.cli import options as opt
from moelocal.errors import BadRequest

if TYPE_CHECKING:
    from moelocal.build.loss import Tell
    from moelocal.build.quantize import QuantizeJob
    from moelocal.build.sized import Survey
    from moelocal.machine.hardware import Machine
    from moelocal.plan.request import PlanRequest

_LINE_S = 15.0  # between lines where no bar can be shown


@dataclass(frozen=True, slots=True)
class Budget:
    """A size to reach, and the machine that it is for."""

    size: Annotated[
        str | None, opt.option("--size", "Instead of --type: the best types whose file is at most this large.", "SIZE")
    ] = None
    fit: Annotated[
        bool, opt.option("--fit", "Instead of --type: the best types with which the model fits this machine.")
    ] = False
    placement_aware: Annotated[
        bool, opt.option("--placement-aware", "With --size or --fit: what goes to the RAM gets types fast on the CPU.")
    ] = False
    ctx: Annotated[int | None, opt.option("--ctx", "With --fit: room for so long a context. [8,192]", "N", min=16)] = (
        None
    )
    ram: Annotated[str | None, opt.option("--ram", "With --fit: use at most this much RAM.", "SIZE")] = None
    gpu_memory: Annotated[
        list[str] | None, opt.option("--gpu-memory", "With --fit: use at most this much of a GPU.", "[DEVICE=]SIZE")
    ] = None
    machine: opt.Described = None

    def __post_init__(self) -> None:
        if self.size is not None and self.fit:
            raise BadRequest("--size and --fit exclude each other.", "Give one of them.")
        looks = self.fit or self.placement_aware
        if self.placement_aware and not self.is_set:
            raise BadRequest("--placement-aware needs a budget.", "Add --fit, or --size such as --size 11GiB.")
        for name in () if looks else ("ctx", "ram", "gpu_memory", "machine"):
            if getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise BadRequest(f"{option} is for --fit and --placement-aware.", f"Add one of them, or drop {option}.")

    @property
    def is_set(self) -> bool:
        """Whether there is a budget."""
        return self.size is not None or self.fit

    @property
    def option(self) -> str:
        """The option that sets it."""
        return "--fit" if self.fit else "--size"

    @property
    def label(self) -> str | None:
        """What a file made for it is named after; None: there is no budget."""
        from moelocal.units import parse_bytes

        if self.fit or self.size is None:
            return "fit" if self.fit else None
        as_typed, size = "".join(self.size.split()), parse_bytes(self.size)
        return as_typed if as_typed[-1].isalpha() else _size_label(size)

    def request(self) -> PlanRequest:
        """What the planner is asked.

        Raises:
            BadRequest: a size that is none.
        """
        from moelocal.plan.request import PlanRequest, parse_gpu_memory
        from moelocal.units import parse_bytes

        ram = None if self.ram is None else parse_bytes(self.ram)
        return PlanRequest(n_ctx=self.ctx, ram_bytes=ram, gpu_bytes=parse_gpu_memory(self.gpu_memory or ()))


def _size_label(n_bytes: int) -> str:
    """A size as part of a file's name: `10.5GiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n_bytes >= size:
            return f"{round(n_bytes / size, 2):g}{unit}"
    return f"{n_bytes}B"


def budgeted(job: QuantizeJob, budget: Budget, is_dry: bool, silent: bool) -> QuantizeJob:
    """The job with the types that a budget gives it.

    Raises:
        MoelocalError: the budget is below what is possible, or makes no sense.
    """
    from moelocal.build import sized
    from moelocal.build.output import check_free
    from moelocal.cli.messages import note
    from moelocal.units import format_bytes, parse_bytes

    if not is_dry:
        check_free(job.output, job.replace)  # before the measuring, which takes a while
    size = None if budget.size is None else parse_bytes(budget.size)
    request = budget.request()
    machine = _machine(budget, job) if budget.fit or budget.placement_aware else None
    with _progress(silent) as tell:
        survey = sized.surveyed(job, job.threads or os.cpu_count() or 1, tell, size)
    if job.imatrix is None:
        note("Without an importance matrix all inputs count alike: moelocal imatrix makes one, and the result better.")
    if size is None:
        assert machine is not None
        size, why = sized.fitting(survey, machine, request)
        note(f"The file may take {format_bytes(size)}: {why}.")
    types = sized.chosen(survey, size)
    if budget.placement_aware and machine is not None:
        types = _fast_in_ram(survey, machine, request, size, types)
    elif size > survey.most_bytes:
        note(f"{format_bytes(size)} is more than there is use for: beyond Q8_0 nothing is gained.")
    return sized.with_types(job, types)


def _fast_in_ram(
    survey: Survey, machine: Machine, request: PlanRequest, size: int, types: dict[str, int]
) -> dict[str, int]:
    """The choice that counts seconds too."""
    from moelocal.build import sized
    from moelocal.cli.messages import note

    costs = sized.seconds_in_ram(survey, machine, types, request)
    if not costs:
        note("Nothing of it goes to the RAM there: --placement-aware changes nothing.")
        return types
    faster = sized.chosen(survey, size, costs)
    before, after = (sum(costs.get(pair, 0.0) for pair in one.items()) for one in (types, faster))
    note(f"What is in RAM takes {after * 1000:.3g} ms per token, for {before * 1000:.3g} ms with the least loss alone.")
    return faster


def _machine(budget: Budget, job: QuantizeJob) -> Machine:
    """The machine that is described, or this one."""
    if budget.machine is not None:
        from moelocal.machine.described import parse_machine

        return parse_machine(budget.machine)
    from moelocal.engine import llama
    from moelocal.machine.hardware import detect

    return detect(llama.devices(), llama.version())


@contextmanager
def _progress(silent: bool) -> Iterator[Tell]:
    """How many tensors are measured, on stderr: a line rewritten on a terminal, else one now and then."""
    from moelocal.cli.messages import dim
    from moelocal.cli.screen import is_dumb

    is_live = sys.stderr.isatty() and not is_dumb() and not silent
    next_at = time.monotonic() + (0.0 if is_live else _LINE_S)

    def tell(done: int, of: int) -> None:
        nonlocal next_at
        if silent or time.monotonic() < next_at:
            return
        next_at = time.monotonic() + (0.1 if is_live else _LINE_S)
        text = f"Measuring what each type loses: {done} of {of} tensors"
        if is_live:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        else:
            dim(text)

    try:
        yield tell
    finally:
        if is_live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
