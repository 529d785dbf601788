"""What llama.cpp really allocated, read from its log: lines of the log in, bytes per device out.

    load_tensors:   CPU_Mapped model buffer size =   612.10 MiB
    llama_kv_cache:       RPC0[127.0.0.1:50052] KV buffer size =   8.00 MiB
    llama_memory_recurrent:        CPU RS buffer size =     0.05 MiB
    sched_reserve:        CPU compute buffer size =    76.27 MiB

Source: llama.cpp 0c1e57098, src/llama-model.cpp (load_tensors), llama-kv-cache.cpp, llama-memory-recurrent.cpp,
llama-context.cpp (sched_reserve, output_reserve).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from moelocal.engine import llama
from moelocal.machine.hardware import Device
from moelocal.model.header import GGUFHeader
from moelocal.model.roles import tensor_role
from moelocal.plan.llama_flags import CPU
from moelocal.plan.planner import MemoryUse, Plan
from moelocal.units import format_bytes

Kind = Literal["weights", "kv", "compute"]
_KINDS: dict[str, Kind] = {"model": "weights", "KV": "kv", "RS": "kv", "state": "kv", "compute": "compute"}
_KINDS["output"] = "compute"
_LINE = re.compile(r"^\S+:\s+(\S+)\s.*?\b(model|KV|RS|state|compute|output) buffer size =\s*([\d.]+) MiB")
_LOG_INFO = 2  # GGML_LOG_LEVEL_INFO
_TOLERANCE = 0.02
_ROUNDING_BYTES = 1 << 20  # so many lines of the log, each rounded; and page alignment


class Buffer(NamedTuple):
    """One buffer of the log, under llama.cpp's name for its type (`CUDA0`, `CPU_Mapped`, `RPC0[host:port]`)."""

    name: str
    kind: Kind
    n_bytes: int

    @property
    def is_mapped(self) -> bool:
        """Whether it is a stretch of the file: from its first tensor to its last, others' in between included."""
        return self.name.endswith("_Mapped")


def logged_buffers() -> tuple[Buffer, ...]:
    """The buffers of what was done last: of loading the weights, or of making the context."""
    return read_buffers(line for _, line in llama.LOG.lines)


def allocated(buffers: Sequence[Buffer], plan: Plan, header: GGUFHeader) -> tuple[MemoryUse, ...]:
    """Bytes per device of these buffers."""
    return per_device(buffers, llama.devices(), llama.buffer_names(), _weights_bytes(plan, header))


def report_differences(plan: Plan, allocated: Sequence[MemoryUse]) -> None:
    """Says in the log, so with -v, where llama.cpp took more or less than planned."""
    if plan.placement is not None:
        for sentence in differences(plan.per_device, allocated):
            llama.LOG.write(_LOG_INFO, f"moelocal: {sentence}\n")


def _weights_bytes(plan: Plan, header: GGUFHeader) -> int:
    """All weights that get loaded; a head that is the embedding exists twice when it is not on the CPU."""
    placement = plan.placement
    n_layers = len(placement.layers) if placement else len(header.tensors)
    total = sum(t.n_bytes for t in header.tensors if (tensor_role(t.name)[0] or 0) < n_layers)
    sizes = {tensor.name: tensor.n_bytes for tensor in header.tensors}
    is_tied = "output.weight" not in sizes and placement is not None and placement.output != CPU
    return total + (sizes.get("token_embd.weight", 0) if is_tied else 0)


def read_buffers(lines: Iterable[str]) -> tuple[Buffer, ...]:
    """The buffers that these log lines name; sizes to the log's last digit."""
    found = (_LINE.match(line) for line in lines)
    return tuple(Buffer(m[1], _KINDS[m[2]], round(float(m[3]) * (1 << 20))) for m in found if m)


def per_device(
    buffers: Sequence[Buffer], devices: Sequence[Device], buffer_names: Mapping[str, str], weights_bytes: int
) -> tuple[MemoryUse, ...]:
    """Bytes per device, as a plan states them: the devices that hold something, the CPU last.

    Args:
        buffer_names: device -> name of its buffers.
        weights_bytes: all weights; what no other buffer holds is what a mapped one holds.
    """
    sums = {device.name: dict.fromkeys(("weights", "kv", "compute"), 0) for device in devices if device.kind != "cpu"}
    sums["CPU"] = {"weights": 0, "kv": 0, "compute": 0}
    unmapped = sum(b.n_bytes for b in buffers if b.kind == "weights" and not b.is_mapped)
    for buffer in buffers:
        n_bytes = min(buffer.n_bytes, max(0, weights_bytes - unmapped)) if buffer.is_mapped else buffer.n_bytes
        sums[_owner(buffer.name, sums, buffer_names)][buffer.kind] += n_bytes
    kinds, totals = {device.name: device.kind for device in devices}, {d.name: d.total_bytes for d in devices}
    return tuple(
        MemoryUse(name, kinds.get(name, "cpu"), use["weights"], use["kv"], use["compute"], totals.get(name, 0))
        for name, use in sums.items()
        if any(use.values())
    )


def _owner(buffer: str, devices: Iterable[str], buffer_names: Mapping[str, str]) -> str:
    """The device that a buffer is on: `CUDA_Host` and `CPU_REPACK` are RAM, `MTL0_Mapped` is the GPU's."""
    for device in devices:
        own = buffer_names.get(device, device)
        if buffer == own or buffer.startswith(own + "_"):
            return device
    return "CPU"


def off_plan(planned: Sequence[MemoryUse], allocated: Sequence[MemoryUse]) -> Iterator[tuple[str, int, int]]:
    """The devices whose use is more than 2 % away from the plan's: name, bytes planned, bytes allocated."""
    before, after = ({use.name: use.total_bytes for use in side} for side in (planned, allocated))
    for name in {**before, **after}:
        plan, real = before.get(name, 0), after.get(name, 0)
        if abs(real - plan) > max(_TOLERANCE * plan, _ROUNDING_BYTES):
            yield name, plan, real


def differences(planned: Sequence[MemoryUse], allocated: Sequence[MemoryUse]) -> tuple[str, ...]:
    """A sentence for each device whose use is more than 2 % away from the plan's."""
    before, after = {use.name: use for use in planned}, {use.name: use for use in allocated}
    told = []
    for name, plan, real in off_plan(planned, allocated):
        parts = ", ".join(
            f"{label} {format_bytes(getattr(after[name], field) if name in after else 0)}"
            f" for {format_bytes(getattr(before[name], field) if name in before else 0)}"
            for label, field in (("weights", "weights_bytes"), ("KV", "kv_bytes"), ("work", "compute_bytes"))
        )
        told.append(f"{name} holds {format_bytes(real)} where {format_bytes(plan)} were planned ({parts}).")
    return tuple(told)
