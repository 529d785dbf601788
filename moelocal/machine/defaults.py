"""Speeds of devices that were never measured: guesses from a name, a bandwidth and a number of cores. Pure.

    speeds = default_speeds(device, cpu)                    # what a card of that name usually does
    speeds = default_speeds(device, cpu, 504e9)             # of that memory bandwidth

`DeviceSpeeds.measured` is False for all of them: whoever shows a prediction made with them says so.
"""

from __future__ import annotations

from moelocal.machine.cards import bandwidth
from moelocal.machine.hardware import Cpu, Device
from moelocal.machine.speeds import DeviceSpeeds, TypeSpeed

RAM_BYTES_PER_S = 40e9  # two channels of DDR4-3200 give 51, DDR5-5600 give 90
GPU_BYTES_PER_S = 300e9
RPC_BYTES_PER_S = 40e9  # some other computer's RAM
APPLE_BYTES_PER_S = 100e9

_DENSE_SHARE, _EXPERT_SHARE, _CPU_SHARE, _REPACKED_SHARE = (
    0.75,
    0.65,
    0.75,
    0.82,
)  # of the bandwidth, what llama.cpp's kernels reach
_GPU_PREFILL_DENSE, _GPU_PREFILL_EXPERT, _METAL_PREFILL = 60.0, 25.0, 13.0  # weights x tokens per byte of bandwidth
_CPU_CORE_DECODE, _CPU_CORE_DECODE_SLOW = 10e9, 4e9  # bytes/s of one core; types that look values up are slow
_CPU_CORE_PREFILL = 60e9
_CPU_CORE_DECODE_MACS, _CPU_CORE_PREFILL_MACS = 5e9, 10e9  # of attention
_CPU_CORE_PREFILL_VALUES = 3e7
_REPACK_GAIN = 1.35  # one reading each on two cores with AVX-512 gave 1.32 and 1.34
_REPACKED = {"Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4"}
_PLAIN = {"F32", "F16", "BF16", "Q8_0"}
_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "Q2_0",
    "Q1_0", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "MXFP4", "NVFP4",
    "TQ2_0", "TQ1_0",
)  # fmt: skip


def default_speeds(device: Device, cpu: Cpu, bytes_per_s: float | None = None) -> DeviceSpeeds:
    """What a device of this kind usually does. `bytes_per_s`: bandwidth of its memory; None: guessed from its name."""
    if device.kind == "cpu":
        return _cpu_speeds(cpu, bytes_per_s or RAM_BYTES_PER_S)
    bandwidth = bytes_per_s or gpu_bandwidth(device)
    is_slow = device.backend == "Metal" or device.kind == "rpc"
    ratios = (_METAL_PREFILL,) * 2 if is_slow else (_GPU_PREFILL_DENSE, _GPU_PREFILL_EXPERT)
    dense = TypeSpeed(bandwidth * _DENSE_SHARE, bandwidth * ratios[0])
    expert = TypeSpeed(bandwidth * _EXPERT_SHARE, bandwidth * ratios[1])
    return DeviceSpeeds({(n, False): dense for n in _TYPES}, {(n, False): expert for n in _TYPES}, 20e-6, 300e-6)


def gpu_bandwidth(device: Device) -> float:
    """Bytes per second of a device's memory, by its name."""
    found = bandwidth(device.description, device.total_bytes)
    if found is not None:
        return found
    if device.backend == "Metal":
        return APPLE_BYTES_PER_S
    if device.shares_ram:
        return RAM_BYTES_PER_S
    return RPC_BYTES_PER_S if device.kind == "rpc" else GPU_BYTES_PER_S


def _cpu_speeds(cpu: Cpu, bandwidth: float) -> DeviceSpeeds:
    rates: dict[tuple[str, bool], TypeSpeed] = {}
    for kind in _TYPES:
        core = _CPU_CORE_DECODE_SLOW if kind.startswith(("IQ", "TQ", "NVFP4")) else _CPU_CORE_DECODE
        core *= 1.5 if kind in _PLAIN else 1
        prefill = _CPU_CORE_PREFILL * cpu.cores
        rates[kind, False] = TypeSpeed(min(bandwidth * _CPU_SHARE, core * cpu.cores), prefill)
        if kind in _REPACKED:
            decode = min(bandwidth * _REPACKED_SHARE, core * cpu.cores * _REPACK_GAIN)
            rates[kind, True] = TypeSpeed(decode, prefill)
    return DeviceSpeeds(
        rates,
        rates,
        layer_s=30e-6,
        token_s=200e-6,
        decode_macs_per_s=_CPU_CORE_DECODE_MACS * cpu.cores,
        prefill_macs_per_s=_CPU_CORE_PREFILL_MACS * cpu.cores,
        prefill_values_per_s=_CPU_CORE_PREFILL_VALUES * cpu.cores,
    )
