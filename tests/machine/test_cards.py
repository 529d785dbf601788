"""Bandwidth by the names that drivers give cards."""

from __future__ import annotations

import pytest

from moelocal.machine.cards import bandwidth
from moelocal.machine.defaults import APPLE_BYTES_PER_S, GPU_BYTES_PER_S, RAM_BYTES_PER_S, gpu_bandwidth
from moelocal.machine.hardware import Device

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "gib", "gb_per_s"),
    [
        ("NVIDIA GeForce RTX 4090", 23.5, 1008),
        ("NVIDIA GeForce RTX 4090 D", 23.5, 1008),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, 576),
        ("NVIDIA GeForce RTX 4070", 11.6, 504),
        ("NVIDIA GeForce RTX 4070 SUPER", 11.6, 504),
        ("NVIDIA GeForce RTX 4070 Ti", 11.6, 504),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.6, 672),
        ("NVIDIA GeForce RTX 4080 SUPER", 15.6, 736),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, 288),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 7.6, 256),
        ("NVIDIA GeForce RTX 3080", 9.8, 760),
        ("NVIDIA GeForce RTX 3080", 11.8, 912),
        ("NVIDIA GeForce RTX 3080 Ti", 11.8, 912),
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", 15.6, 512),
        ("NVIDIA GeForce RTX 3070 Ti", 7.8, 608),
        ("NVIDIA GeForce RTX 3060 Ti", 7.8, 448),
        ("NVIDIA GeForce RTX 3060", 11.8, 360),
        ("NVIDIA GeForce RTX 3060", 7.8, 240),
        ("NVIDIA GeForce RTX 5060 Ti", 15.5, 448),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 23.5, 896),
        ("NVIDIA GeForce RTX 5090", 31.4, 1792),
        ("NVIDIA GeForce GTX 1080 Ti", 11, 484),
        ("NVIDIA TITAN RTX", 23.6, 672),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, 960),
        ("Quadro RTX 6000", 23.6, 672),
        ("NVIDIA RTX A6000", 47.4, 768),
        ("NVIDIA RTX A5000", 23.6, 768),
        ("NVIDIA RTX A4000", 15.7, 448),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95, 1792),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 95, 1792),
        ("NVIDIA RTX 2000 Ada Generation", 15.6, 224),
        ("NVIDIA RTX 4000 Ada Generation", 19.6, 360),
        ("NVIDIA RTX 4000 SFF Ada Generation", 19.6, 280),
        ("NVIDIA RTX 2000 Ada Generation Laptop GPU", 7.6, 256),
        ("Tesla V100-SXM2-16GB", 15.8, 900),
        ("Tesla P100-PCIE-16GB", 15.9, 732),
        ("Tesla P100-PCIE-12GB", 11.9, 549),
        ("NVIDIA A100-SXM4-40GB", 39.4, 1555),
        ("NVIDIA A100-SXM4-80GB", 79.2, 2039),
        ("NVIDIA A100 80GB PCIe", 79.2, 1935),
        ("NVIDIA H100 80GB HBM3", 79.1, 3350),
        ("NVIDIA H100 PCIe", 79.1, 2000),
        ("NVIDIA L40S", 44.5, 864),
        ("NVIDIA L4", 22, 300),
        ("NVIDIA A10G", 22, 600),
        ("NVIDIA GB10", 119, 273),
        ("AMD Instinct MI50/MI60", 16, 1024),
        ("AMD Instinct MI100", 32, 1229),
        ("AMD Instinct MI210", 64, 1638),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 24, 960),
        ("AMD Radeon RX 7900 XT", 20, 800),
        ("AMD Radeon RX 7900 GRE", 16, 576),
        ("AMD Radeon RX 9060 XT", 16, 320),
        ("AMD Radeon RX 6800 XT", 16, 512),
        ("Radeon 8060S Graphics (RADV GFX1151)", 96, 256),
        ("Intel(R) Arc(TM) B570 Graphics (BMG G21)", 10, 380),
        ("Intel(R) Arc(tm) A770 Graphics (DG2)", 15.9, 560),
        ("Intel® Arc™ A750 Graphics", 7.9, 512),
        ("Apple M1", 10.7, 68),
        ("Apple M1 Ultra", 96, 800),
        ("Apple M2 Max", 48, 400),
        ("Apple M4", 16, 120),
        ("Apple M4 Max", 27, 410),
        ("Apple M4 Max", 36, 546),
        ("Apple M5", 24, 153),
    ],
)
def test_names_as_drivers_say_them(name: str, gib: float, gb_per_s: float) -> None:
    assert bandwidth(name, int(gib * GIB)) == gb_per_s * 1e9


@pytest.mark.parametrize("name", ["", "GPU", "RTX 40900", "GeForce RTX", "Apple M99", "AMD Radeon Graphics", "XL40"])
def test_a_name_that_only_contains_another_is_not_it(name: str) -> None:
    assert bandwidth(name, 8 * GIB) is None


def test_guesses_for_unknown_names() -> None:
    assert gpu_bandwidth(Device("CUDA0", "new", "gpu", GIB, GIB, "CUDA")) == GPU_BYTES_PER_S
    assert gpu_bandwidth(Device("Vulkan0", "new", "gpu", GIB, GIB, "Vulkan", shares_ram=True)) == RAM_BYTES_PER_S
    assert gpu_bandwidth(Device("MTL0", "Apple M99", "gpu", GIB, GIB, "Metal", shares_ram=True)) == APPLE_BYTES_PER_S
