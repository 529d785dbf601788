"""`moelocal doctor`: the machine, what keeps it from its best, and what size of model runs well on it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

from moelocal.cli import options as opt

if TYPE_CHECKING:
    from moelocal.machine.hardware import Engine, Machine
    from moelocal.machine.problems import Problem


def doctor(
    probe: Annotated[bool, opt.option("--probe", "Measure the speeds of this machine first: about a minute.")] = False,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show this machine, its problems with the command that fixes each, and what size of model runs well on it."""
    from moelocal.engine import llama
    from moelocal.machine.hardware import Engine, detect
    from moelocal.machine.problems import find_problems

    llama.LOG.verbose = verbose
    devices = llama.devices()
    engine = Engine(llama.version(), llama.backends(), llama.system_info(), llama.supports_rpc())
    if probe:
        from moelocal.cli.measuring import measure

        measure(detect(devices, engine.version), engine.version)
    machine = detect(devices, engine.version, whole=True)
    problems = find_problems(machine, engine)
    if as_json:
        print(json.dumps(as_document(machine, engine, problems), ensure_ascii=False))
        return
    from moelocal.cli.render_doctor import show
    from moelocal.plan.verdict import give_verdict

    show(sys.stdout, machine, engine, problems, give_verdict(machine))


def as_document(machine: Machine, engine: Engine, problems: tuple[Problem, ...]) -> dict[str, Any]:
    """What `doctor --json` prints; null where nothing was measured."""
    cpu, disk = machine.cpu, machine.disk
    return {
        "cpu": {
            "name": cpu.name,
            "physical_cores": cpu.physical_cores,
            "logical_cores": cpu.logical_cores,
            "features": list(cpu.features),
        },
        "ram": {
            "total_bytes": machine.ram_total_bytes,
            "free_bytes": machine.ram_free_bytes,
            "bandwidth_bytes_per_s": machine.measured_bandwidth("CPU"),
        },
        "devices": [
            {
                "name": device.name,
                "description": device.description,
                "backend": device.backend,
                "kind": device.kind,
                "total_bytes": device.total_bytes,
                "free_bytes": device.free_bytes,
                "bandwidth_bytes_per_s": machine.measured_bandwidth(device.name),
            }
            for device in machine.devices
        ],
        "disk": {"path": disk.path, "free_bytes": disk.free_bytes, "read_bytes_per_s": disk.read_bytes_per_s},
        "llama_cpp": {"version": engine.version, "backends": list(engine.backends)},
        "problems": [{"what": problem.what, "fix": problem.fix} for problem in problems],
    }
