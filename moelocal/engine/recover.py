"""Fit or stop: a load that fails for memory is tried once more with a smaller plan, and what worked is remembered.

Remembered are not plans but steps down from what the planner says, for one file on one machine with one driver: so a
better planner, or more free memory, still helps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

from moelocal.engine import llama
from moelocal.errors import OutOfMemory
from moelocal.machine.hardware import Machine
from moelocal.paths import user_home
from moelocal.plan.llama_flags import CPU
from moelocal.plan.planner import Plan
from moelocal.units import format_bytes

T = TypeVar("T")
Memory = Literal["gpu", "ram"]
MAX_STEPS = 6
_STEP = 0.88


def load_or_step_down(
    plan: Plan, load: Callable[[Plan], T], smaller: Callable[[Plan], Plan | None], tell: Callable[[str], None]
) -> tuple[T, Plan]:
    """Loads as planned; when there is not enough memory, once more with the next smaller plan, and says so.

    Args:
        smaller: the plan to try after one that failed; None: there is none.

    Raises:
        OutOfMemory: neither fits; and whatever else `load` raises.
    """
    try:
        return load(plan), plan
    except OutOfMemory as failure:
        less = smaller(plan)
        if less is None:
            raise
        tell(f"{failure.message} {describe_step(plan, less)}")
    return load(less), less


def describe_step(before: Plan, after: Plan) -> str:
    """What a smaller plan gives up, in one sentence."""
    changes = []
    if after.n_ctx != before.n_ctx:
        changes.append(f"a context of {after.n_ctx:,} tokens instead of {before.n_ctx:,}")
    if before.placement and after.placement and after.placement != before.placement:
        then, now = (sum(name != "CPU" for name in p.experts) for p in (before.placement, after.placement))
        changes.append(f"the experts of {now} layers on GPUs instead of {then}")
    if after.n_ubatch != before.n_ubatch:
        changes.append(f"prompts in batches of {after.n_ubatch:,} tokens instead of {before.n_ubatch:,}")
    if after.kv_type != before.kv_type:
        changes.append(f"a KV cache of {after.kv_type} instead of {before.kv_type}")
    if before.repack and not after.repack:
        changes.append("weights mapped from the file instead of repacked")
    return f"Trying again with {', '.join(changes) or 'less memory'}."


class Stairs:
    """Plans that need less and less, each from a planner that is told of less free memory.

    A step takes an eighth off what the last plan used of the GPUs' memory, or of RAM: so it helps whatever made the
    memory smaller than it looked. `taken` are the steps so far; made with those of an earlier run, it starts there.
    """

    def __init__(self, machine: Machine, plan_for: Callable[[Machine], Plan], taken: Sequence[Memory] = ()) -> None:
        self.taken: list[Memory] = []
        self._machine, self._plan_for = machine, plan_for
        self.plan = plan_for(machine)
        for memory in taken[:MAX_STEPS]:
            self.plan = self.below(self.plan, memory) or self.plan

    def below(self, plan: Plan, memory: Memory | None = None) -> Plan | None:
        """The next smaller plan; None: there is none. `memory`: which one ran out, by default a GPU's if it has one."""
        uses_gpu = any(use.kind != "cpu" for use in plan.per_device)
        short_of: Memory = memory or ("gpu" if uses_gpu else "ram")
        while len(self.taken) < MAX_STEPS:
            self.taken.append(short_of)
            self._machine = with_less_memory(self._machine, plan, short_of)
            try:
                less = self._plan_for(self._machine)
            except OutOfMemory:
                return None
            if _settings(less) != _settings(plan):
                return less
        return None


def with_less_memory(machine: Machine, plan: Plan, memory: Memory) -> Machine:
    """The same machine with less free memory than this plan uses, of GPUs or of RAM."""
    used = {use.name: use.total_bytes for use in plan.per_device}

    def less(free_bytes: int, name: str) -> int:
        return int(_STEP * min(free_bytes, used.get(name) or free_bytes))

    if memory == "ram":
        return replace(machine, ram_free_bytes=less(machine.ram_free_bytes, CPU))
    devices = tuple(
        device if device.kind == "cpu" else replace(device, free_bytes=less(device.free_bytes, device.name))
        for device in machine.devices
    )
    return replace(machine, devices=devices)


def _settings(plan: Plan) -> tuple[object, ...]:
    """What llama.cpp is told: a plan without its words and figures."""
    return plan.n_ctx, plan.kv_type, plan.n_ubatch, plan.n_gpu_layers, plan.repack, plan.load_mode, plan.placement


def remembered_steps(path: Path, machine: Machine) -> tuple[Memory, ...]:
    """The steps down that this file needed on this machine with this driver; none when it was never too large."""
    if not any(_folder().glob(f"{_stem(path)}-*")):  # nearly always: saves the time to import hashlib
        return ()
    try:
        record = json.loads(_record(path).read_text())
        steps, is_known = list(record["steps"]), record["for"] == _identity(path, machine)
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(step for step in steps if step in ("gpu", "ram"))[:MAX_STEPS] if is_known else ()


def remember_steps(path: Path, machine: Machine, steps: Sequence[Memory], plan: Plan) -> None:
    """Keeps what worked; a folder that cannot be written is no reason to fail."""
    record = {
        "for": _identity(path, machine),
        "steps": list(steps),
        "n_ctx": plan.n_ctx,
        "devices": {use.name: format_bytes(use.total_bytes) for use in plan.per_device},
    }
    file = _record(path)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(record, indent=1))
        new.replace(file)


def _record(path: Path) -> Path:
    import hashlib  # slow to import

    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return _folder() / f"{_stem(path)}-{name}.json"


def _folder() -> Path:
    return user_home() / "plans"


def _stem(path: Path) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in path.stem[:40])


def _identity(path: Path, machine: Machine) -> dict[str, object]:
    """File, machine and driver; another one of them, and the planner decides anew."""
    stat = path.stat()
    driver = Path("/proc/driver/nvidia/version")
    return {
        "bytes": stat.st_size,
        "modified": int(stat.st_mtime),
        "ram_bytes": machine.ram_total_bytes,
        "devices": [f"{d.name} {d.description} {d.total_bytes}" for d in machine.gpus],
        "llama_cpp": llama.version(),
        "driver": driver.read_text() if driver.exists() else "",
    }
