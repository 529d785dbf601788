"""What this machine is: cores, RAM that may really be used, and the devices that llama.cpp reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moelocal.machine.cpu import count_cores, cpu_features, cpu_name
from moelocal.machine.disk import read_space
from moelocal.machine.memory import read_ram
from moelocal.machine.speeds import Speeds, load_speeds
from moelocal.machine.system import System
from moelocal.paths import hub_folder


class Cpu(NamedTuple):
    """The processor. `cores` should compute: physical ones that this process may use, performance cores on hybrids.

    `performance_cores`: how many there are, used or not; 0 where nobody looked.
    """

    name: str
    cores: int
    physical_cores: int
    logical_cores: int
    features: tuple[str, ...] = ()
    performance_cores: int = 0


class Disk(NamedTuple):
    """Where models are kept: the folder, the bytes free there, and its measured random-read speed; None: not known."""

    path: str
    free_bytes: int | None = None
    read_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A device that llama.cpp can compute on. Sizes in bytes; a CPU's are the RAM's. `backend` is CPU, CUDA, Metal,
    Vulkan, RPC, ...; `shares_ram`: its memory is the system's (Apple silicon, integrated graphics); `buffer_name`: what
    overrides call it, where that is not its name (`RPC0[192.168.1.5:50052]`)."""

    name: str
    description: str
    kind: Literal["cpu", "gpu", "rpc"]
    total_bytes: int
    free_bytes: int
    backend: str = "CPU"
    shares_ram: bool = False
    buffer_name: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine, here or described. RAM sizes respect the container's limit."""

    devices: tuple[Device, ...]
    cpu: Cpu
    ram_total_bytes: int
    ram_free_bytes: int
    disk: Disk
    speeds: Speeds

    @property
    def gpus(self) -> tuple[Device, ...]:
        """The devices that can hold layers."""
        return tuple(device for device in self.devices if device.kind != "cpu")

    def measured_bandwidth(self, name: str) -> float | None:
        """Bytes per second that a device was measured to read weights with, for one token; None if it was not."""
        speeds = self.speeds.devices.get(name)
        return speeds.bandwidth_bytes_per_s or None if speeds and speeds.measured else None


class Engine(NamedTuple):
    """What llama.cpp says of itself: its version, the backends it was built with, its line about CPU kernels."""

    version: str
    backends: tuple[str, ...]
    system_info: str = ""
    rpc: bool = True


def detect(
    devices: tuple[Device, ...] = (), engine: str = "", whole: bool = False, here: System | None = None
) -> Machine:
    """Looks at the machine.

    Args:
        devices: from `engine.llama.devices()`, since this room needs no native code.
        engine: from `engine.llama.version()`: speeds measured with this very engine are loaded.
        whole: also what only people read and what takes longer to find: the CPU's features, the disk.
    """
    here = here or System()
    ram, cores = read_ram(here), count_cores(here)
    told = next((device.description for device in devices if device.backend == "CPU"), "")
    cpu = Cpu(
        name=cpu_name(here, told),
        cores=cores.usable,
        physical_cores=cores.physical,
        logical_cores=cores.logical,
        features=cpu_features(here) if whole else (),
        performance_cores=cores.performance,
    )
    measured = None
    if engine:
        local = tuple(device for device in devices if device.kind != "rpc")
        measured = load_speeds(identity(cpu, devices, engine)) or load_speeds(identity(cpu, local, engine))
    space = read_space(hub_folder()) if whole else None
    disk = Disk(
        str(space.folder) if space else "",
        space.free_bytes if space else None,
        measured.disk_bytes_per_s if measured else None,
    )
    return Machine(devices, cpu, ram.total_bytes, ram.free_bytes, disk, measured or Speeds())


def identity(cpu: Cpu, devices: tuple[Device, ...], engine: str) -> str:
    """What measured speeds depend on: the processor and how many cores are used, the graphics cards, workers
    elsewhere, the engine."""
    cards = [f"{device.name}={device.description}" for device in devices if device.kind != "cpu"]
    return " | ".join([f"{cpu.name} x{cpu.cores}", *cards, f"llama-cpp-python {engine}"])
