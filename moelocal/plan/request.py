"""What the user asked for, and the budgets that follow from it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from moelocal.errors import BadRequest
from moelocal.machine.hardware import Device, Machine
from moelocal.model.kv import KVType
from moelocal.plan.cost import Seconds
from moelocal.plan.memory import CPU
from moelocal.units import parse_bytes

Objective = Literal["chat", "long-prompt", "throughput"]
N_UBATCH = 512  # tokens of a prompt that are computed at once, where nothing else is better
_MARGIN_BYTES, _MARGIN_SHARE, _MARGIN_MOST = 256 << 20, 0.03, 512 << 20


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for; None leaves the choice to the planner. Budgets mean: at most this much. `gpu_bytes` are
    (device name, bytes), the name None for every GPU. `one_shot`: one answer, so the time to load counts in full.
    `threads_batch` are those for prompts, `threads` where None; `flash_attn` None: llama.cpp's own choice. `tuned` are
    the fields that measuring gave, not the user."""

    n_ctx: int | None = None
    kv_type: KVType | None = None
    threads: int | None = None
    n_ubatch: int | None = None
    cpu_only: bool = False
    n_outputs: int = 1  # tokens of a batch whose logits are kept
    experts_used: int | None = None  # per token, instead of the model's own number
    ram_bytes: int | None = None
    gpu_bytes: tuple[tuple[str | None, int], ...] = ()
    experts_on_cpu: int | None = None
    objective: Objective = "chat"
    one_shot: bool = False
    repack: bool | None = None
    threads_batch: int | None = None
    flash_attn: bool | None = None
    tuned: tuple[str, ...] = ()
    lossy_misses: int = 0  # of a token and layer, experts on the disk for which others in RAM may stand in

    def untuned(self) -> PlanRequest:
        """The same without what measuring gave."""
        nothing: dict[str, Any] = dict.fromkeys(self.tuned)
        return replace(self, tuned=(), **nothing)

    def source(self, field: str) -> str:
        """Who chose a field that is given, for the end of a sentence."""
        return "as moelocal tune found" if field in self.tuned else "as asked"


class Turn(NamedTuple):
    """What is typical for an objective: a prompt of `n_prompt` new tokens, an answer of `n_answer`, `n_depth` tokens in
    the cache meanwhile; `load_share` of the load counts, as one load serves many turns. `n_ctx`: the context chosen."""

    n_prompt: int
    n_answer: int
    n_depth: int
    load_share: float
    n_ctx: int

    def seconds(self, seconds: Seconds) -> float:
        """Seconds of a turn: what the planner makes small."""
        return seconds.prefill + self.n_answer * seconds.decode + self.load_share * seconds.load


_TURNS: dict[Objective, Turn] = {
    "chat": Turn(512, 256, 2048, 1 / 40, 8192),
    "long-prompt": Turn(8192, 256, 8192, 1 / 20, 32768),
    "throughput": Turn(1024, 1024, 2048, 1 / 100, 8192),
}
_ONE_SHOT = Turn(128, 256, 256, 1.0, 8192)


def turn_of(request: PlanRequest) -> Turn:
    """The turn that a request is planned for."""
    turn = _TURNS[request.objective]
    return _ONE_SHOT if request.one_shot and request.objective == "chat" else turn


def parse_gpu_memory(texts: Sequence[str]) -> tuple[tuple[str | None, int], ...]:
    """`12GiB` or `CUDA0=12GiB`, repeated.

    Raises:
        BadRequest: not a size.
    """
    pairs = (text.rpartition("=") for text in texts)
    return tuple((name.strip() or None, parse_bytes(size)) for name, _, size in pairs)


def bounded(machine: Machine, request: PlanRequest) -> Machine:
    """The machine with only what may be used of it: free bytes of devices and RAM are budgets from here on.

    Raises:
        BadRequest: a device is named that is not there.
    """
    limits = dict[str | None, int]()
    names = {device.name.lower(): device.name for device in machine.gpus}
    for name, size in request.gpu_bytes:
        if name is not None and name.lower() not in names:
            there = ", ".join(names.values()) or "none: llama.cpp sees no GPU here"
            raise BadRequest(f"There is no GPU named {name!r}.", f"Those that are there: {there}. See: moelocal doctor")
        limits[None if name is None else names[name.lower()]] = size
    if limits and request.cpu_only:
        raise BadRequest("--cpu-only and --gpu-memory exclude each other.", "Give one of them.")
    ram = machine.ram_free_bytes if request.ram_bytes is None else min(request.ram_bytes, machine.ram_free_bytes)
    gpus = []
    for device in () if request.cpu_only else machine.gpus:
        limit = limits.get(device.name, limits.get(None, device.free_bytes))
        budget = max(0, min(limit, device.free_bytes - margin_bytes(device)))
        if limit > 0:
            gpus.append(replace(device, free_bytes=min(budget, ram) if device.shares_ram else budget))
    cpu = next((d for d in machine.devices if d.kind == "cpu"), Device(CPU, "", "cpu", machine.ram_total_bytes, ram))
    return replace(machine, devices=(replace(cpu, name=CPU, free_bytes=ram), *gpus), ram_free_bytes=ram)


def margin_bytes(device: Device) -> int:
    """Bytes that stay free on a GPU: drivers and other programs take some without telling."""
    return min(_MARGIN_MOST, max(_MARGIN_BYTES, int(device.total_bytes * _MARGIN_SHARE)))
