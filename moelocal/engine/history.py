"""What answers and benchmarks measured, kept for each model file: a line of JSON each, in MOELOCAL_HOME/runs.

A line is appended with a single write, so two programs at once neither lose nor mix theirs; one that cannot be
understood is passed over. A file that is long enough becomes the older half, in place of the one before.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from moelocal.engine import llama
from moelocal.errors import BadRequest
from moelocal.machine.hardware import Machine, identity
from moelocal.model.kv import KVType
from moelocal.paths import runs_file
from moelocal.plan.calibration import Difference, Run
from moelocal.plan.cost import Placement, Setting

if TYPE_CHECKING:
    from moelocal.engine.meter import Meter
    from moelocal.engine.session import Session
    from moelocal.plan.planner import Plan

_VERSION = 1
_KEPT = 20  # runs that a plan looks at
_HALF_BYTES = 32 << 10
_MAX_BYTES = 1 << 20


class Timed(NamedTuple):
    """Tokens of a prompt or of an answer, their seconds, and how many were in the cache on average."""

    n_tokens: int = 0
    seconds: float = 0.0
    n_depth: int = 0


def remember(meter: Meter) -> None:
    """Keeps what the last answer measured, if it was long enough; a folder that cannot be written is no failure."""
    run = _run_of(meter)
    if run is not None and _is_as_planned(meter.session.plan, meter.machine):
        _keep(meter.path, meter.machine, run)


def remember_speeds(path: Path, machine: Machine, session: Session, prompt: Timed, answer: Timed) -> None:
    """Keeps what a benchmark measured, as if it were an answer: a prompt with nothing before it, then generation."""
    plan = session.plan
    if plan.setting is None or not _is_as_planned(plan, machine):
        return
    ram_bytes, off = _around(session, machine)
    _keep(
        path,
        machine,
        Run(
            plan.setting, ram_bytes, prompt.n_tokens, prompt.seconds, prompt.seconds, answer.n_depth,
            answer.n_tokens, answer.seconds, session.load_s, off,
        ),
    )  # fmt: skip


def _is_as_planned(plan: Plan, machine: Machine) -> bool:
    """Whether weights that the plan reads from disk had to be read there: those that are only beyond a budget that was
    asked for (--ram) stay in free memory all the same, and would teach that disks are fast."""
    return not plan.disk_bytes or plan.ram_bytes is None or plan.ram_bytes >= machine.ram_free_bytes


def _keep(path: Path, machine: Machine, run: Run) -> None:
    if not (run.has_decode or run.has_prefill):
        return
    with suppress(OSError, BadRequest):
        line = {"version": _VERSION, "file": _file(path), "machine": _machine(machine, run.setting)}
        # a line that a full disk cut off is ended here
        data = b"\n" + json.dumps({**line, **_encoded(run)}, separators=(",", ":")).encode() + b"\n"
        append(runs_file(path), data, _HALF_BYTES)


def append(file: Path, data: bytes, half_bytes: int) -> None:
    """Adds lines with a single write. A file longer than `half_bytes` becomes the older half first.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if file.stat().st_size > half_bytes:
            file.replace(_older(file))
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read_runs(path: Path, machine: Machine) -> tuple[Run, ...]:
    """The latest runs of this very file on this very machine, the oldest first."""
    found: list[Run] = []
    with suppress(OSError, BadRequest):
        its_file, newest = _file(path), runs_file(path)
        for line in lines_backwards(newest):
            with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                stored = json.loads(line)
                run = _decoded(stored)
                if [stored["version"], stored["file"]] == [_VERSION, its_file] and stored["machine"] == _machine(
                    machine, run.setting
                ):
                    found.append(run)
            if len(found) == _KEPT:
                break
    return tuple(reversed(found))


def lines_backwards(file: Path, most_bytes: int = _MAX_BYTES) -> Iterator[bytes]:
    """Lines that were appended, the latest first, those of the older half too; what cannot be read is not there."""
    for half in (file, _older(file)):
        with suppress(OSError):
            with half.open("rb") as opened:
                data = opened.read(most_bytes)
            yield from (line for line in reversed(data.split(b"\n")) if line.strip())


def _older(file: Path) -> Path:
    return file.with_suffix(".older.jsonl")


def _run_of(meter: Meter) -> Run | None:
    timings, session = meter.timings, meter.session
    plan = session.plan
    if timings is None or plan.setting is None:
        return None
    n_decoded = max(0, timings.generated_tokens - 1)
    ram_bytes, off = _around(session, meter.machine)
    return Run(
        plan.setting,
        ram_bytes,
        timings.prompt_tokens - timings.cached_tokens,
        timings.prompt_s,
        timings.first_token_s if timings.generated_tokens else 0.0,
        timings.prompt_tokens + n_decoded // 2,
        n_decoded,
        max(0.0, timings.generate_s - meter.away_s),
        timings.load_s,
        off,
    )


def _around(session: Session, machine: Machine) -> tuple[int, tuple[Difference, ...]]:
    """How much RAM the plan might use, and where llama.cpp took another amount of memory than planned."""
    from moelocal.engine.allocation import off_plan

    plan = session.plan
    ram_bytes = machine.ram_free_bytes if plan.ram_bytes is None else plan.ram_bytes
    comparable = plan.n_ctx == session.n_ctx and not plan.disk_bytes
    off = tuple(Difference(*one) for one in off_plan(plan.per_device, session.allocated)) if comparable else ()
    return ram_bytes, off


def _file(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _machine(machine: Machine, setting: Setting) -> str:
    """What speeds depend on, and which other machines take part."""
    used = {*setting.placement.layers, *setting.placement.experts, setting.placement.output}
    devices = tuple(device for device in machine.devices if device.kind != "rpc" or device.name in used)
    return identity(machine.cpu, devices, llama.version())


def _encoded(run: Run) -> dict[str, Any]:
    setting = run.setting
    places = setting.placement
    return {
        **{name: value for name, value in run._asdict().items() if name != "setting"},
        "layers": _packed(places.layers),
        "experts": _packed(places.experts),
        "output": places.output,
        "parts": places.parts,
        "n_ctx": setting.n_ctx,
        "kv_type": setting.kv_type,
        "n_ubatch": setting.n_ubatch,
        "threads": setting.threads,
        "repack": setting.repack,
        "load_mode": setting.load_mode,
    }


def _decoded(stored: Any) -> Run:
    """The inverse of `_encoded`; whatever is not as written there raises one of the errors that `read_runs` knows."""
    parts = tuple((_text(name), _text(device)) for name, device in stored["parts"])
    setting = Setting(
        Placement(_unpacked(stored["layers"]), _unpacked(stored["experts"]), _text(stored["output"]), parts),
        _count(stored["n_ctx"]),
        _kv_type(stored["kv_type"]),
        _count(stored["n_ubatch"]),
        _count(stored["threads"]),
        stored["repack"] is True,
        "none" if stored["load_mode"] == "none" else "mmap",
    )
    off = tuple(Difference(_text(name), _count(plan), _count(real)) for name, plan, real in stored["differences"])
    return Run(
        setting=setting,
        ram_bytes=_count(stored["ram_bytes"]),
        n_prompt=_count(stored["n_prompt"]),
        n_depth=_count(stored["n_depth"]),
        n_decoded=_count(stored["n_decoded"]),
        prompt_s=_seconds(stored["prompt_s"]),
        first_token_s=_seconds(stored["first_token_s"]),
        decode_s=_seconds(stored["decode_s"]),
        load_s=_seconds(stored["load_s"]),
        differences=off,
    )


def _packed(names: tuple[str, ...]) -> list[tuple[str, int]]:
    return [(name, len(list(group))) for name, group in groupby(names)]


def _unpacked(packed: list[Any]) -> tuple[str, ...]:
    if sum(_count(n) for _, n in packed) > 1 << 16:
        raise ValueError(packed)
    return tuple(name for name, n in packed for _ in range(n))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _kv_type(value: Any) -> KVType:
    kinds: dict[str, KVType] = {kind: kind for kind in get_args(KVType)}
    return kinds[value]


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(value)
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, (bool, str)) or not math.isfinite(value) or value < 0:
        raise ValueError(value)
    return float(value)
