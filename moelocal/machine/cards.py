"""Memory bandwidth of graphics cards by name, from their makers' data sheets. Pure.

    bandwidth("NVIDIA GeForce RTX 4090 Laptop GPU", 16 << 30)  ->  576e9

Names are compared word by word, and the longest one counts: a laptop's card, a Ti and a SUPER have memory of their own.
Where one name was sold with different memory, the entry with a size (`RTX 3060 12GB`) is for cards of at least that.

Source: the data sheets and product pages of NVIDIA, AMD, Intel and Apple; the bandwidth is the peak that they name.
"""

from __future__ import annotations

import re

_GB_PER_S = """
RTX 5090 1792, RTX 5090 D 1792, RTX 5080 960, RTX 5070 Ti 896, RTX 5070 672, RTX 5060 Ti 448, RTX 5060 448, RTX 5050 320
RTX 5090 Laptop 896, RTX 5080 Laptop 896, RTX 5070 Ti Laptop 672, RTX 5070 Laptop 384, RTX 5060 Laptop 384
RTX 5050 Laptop 384
RTX 4090 1008, RTX 4090 D 1008, RTX 4080 SUPER 736, RTX 4080 717, RTX 4070 Ti SUPER 672, RTX 4070 Ti 504
RTX 4070 SUPER 504, RTX 4070 504, RTX 4060 Ti 288, RTX 4060 272
RTX 4090 Laptop 576, RTX 4080 Laptop 432, RTX 4070 Laptop 256, RTX 4060 Laptop 256, RTX 4050 Laptop 192
RTX 3090 Ti 1008, RTX 3090 936, RTX 3080 Ti 912, RTX 3080 760, RTX 3080 12GB 912, RTX 3070 Ti 608, RTX 3070 448
RTX 3060 Ti 448, RTX 3060 240, RTX 3060 12GB 360, RTX 3050 168, RTX 3050 8GB 224
RTX 3080 Ti Laptop 512, RTX 3080 Laptop 448, RTX 3070 Ti Laptop 448, RTX 3070 Laptop 448, RTX 3060 Laptop 336
RTX 3050 Ti Laptop 192, RTX 3050 Laptop 192, RTX 3050 Laptop 6GB 168
RTX 2080 Ti 616, RTX 2080 SUPER 496, RTX 2080 448, RTX 2070 SUPER 448, RTX 2070 448, RTX 2060 SUPER 448, RTX 2060 336
GTX 1660 Ti 288, GTX 1660 SUPER 336, GTX 1660 192, GTX 1650 SUPER 192, GTX 1650 128
GTX 1080 Ti 484, GTX 1080 320, GTX 1070 Ti 256, GTX 1070 256, GTX 1060 192
TITAN RTX 672, TITAN V 653, TITAN Xp 548

RTX PRO 6000 Blackwell 1792, RTX PRO 6000 Blackwell Server 1597, RTX PRO 5000 Blackwell 1344, RTX PRO 4500 Blackwell 896
RTX PRO 4000 Blackwell 672, RTX PRO 4000 Blackwell SFF 432, RTX PRO 2000 Blackwell 288
RTX PRO 5000 Blackwell Generation Laptop 896, RTX PRO 4000 Blackwell Generation Laptop 896
RTX PRO 3000 Blackwell Generation Laptop 672, RTX PRO 2000 Blackwell Generation Laptop 384
RTX 6000 Ada 960, RTX 5000 Ada 576, RTX 4500 Ada 432, RTX 4000 Ada 360, RTX 4000 SFF Ada 280, RTX 2000 Ada 224
RTX 5000 Ada Generation Laptop 576, RTX 4000 Ada Generation Laptop 432, RTX 3500 Ada Generation Laptop 432
RTX 3000 Ada Generation Laptop 256, RTX 2000 Ada Generation Laptop 256
RTX A6000 768, RTX A5500 768, RTX A5000 768, RTX A4500 640, RTX A4000 448, RTX A2000 288
RTX A5000 Laptop 448, RTX A4000 Laptop 384, RTX A2000 Laptop 192
Quadro RTX 8000 672, Quadro RTX 6000 672, Quadro RTX 5000 448, Quadro RTX 4000 416
B200 8000, H200 4800, GH200 4000, H100 3350, H100 PCIe 2000, H100 NVL 3938, A100 1555
A100 80GB 1935, A100 SXM4 80GB 2039
V100 900, V100S 1134, P100 732, P100 PCIE 12GB 549, P100 PCIE 16GB 732, P40 347, P4 192, M40 288
L40S 864, L40 864, L4 300, T4 320, A40 696, A30 933, A16 200, A10 600, A10G 600, A2 200, GB10 273, Orin 205, Thor 273

RX 9070 XT 645, RX 9070 645, RX 9070 GRE 432, RX 9060 XT 320
RX 7900 XTX 960, RX 7900 XT 800, RX 7900 GRE 576, RX 7800 XT 624, RX 7700 XT 432, RX 7600 XT 288, RX 7600 288
RX 7900M 576, RX 6950 XT 576, RX 6900 XT 512, RX 6800 XT 512, RX 6800 512, RX 6750 XT 432, RX 6700 XT 384, RX 6700 320
RX 6650 XT 280, RX 6600 XT 256, RX 6600 224, RX 6500 XT 144, RX 5700 XT 448, RX 5700 448, RX Vega 64 484, RX Vega 56 410
RX 580 256, RX 570 224, Radeon VII 1024
PRO W7900 864, PRO W7800 576, PRO W6800 512, PRO R9700 640
MI25 484, MI50 1024, MI60 1024, MI100 1229, MI210 1638, MI250 1638, MI250X 1638, MI300X 5300, MI325X 6000
Radeon 8060S 256, Radeon 8050S 256, Radeon 890M 120, Radeon 880M 120, Radeon 780M 90, Radeon 680M 77

Arc B580 456, Arc B570 380, Arc Pro B60 456, Arc Pro B50 224, Arc A770 512, Arc A770 16GB 560, Arc A750 512
Arc A580 512, Arc A380 186, Arc A310 124, Arc 140V 136

Apple M1 68, Apple M1 Pro 200, Apple M1 Max 400, Apple M1 Ultra 800, Apple M2 100, Apple M2 Pro 200, Apple M2 Max 400
Apple M2 Ultra 800, Apple M3 100, Apple M3 Pro 150, Apple M3 Max 300, Apple M3 Max 36GB 400, Apple M3 Ultra 819
Apple M4 120, Apple M4 Pro 273, Apple M4 Max 410, Apple M4 Max 36GB 546
Apple M5 153, Apple M5 Pro 307, Apple M5 Max 460, Apple M5 Max 36GB 614
"""
# A Mac lends its GPU three quarters of its memory: 36 GB are lent by those with 48 and more, which have the wider bus
_SIZE = re.compile(r"(\d+)gb")
_NEARLY = 0.95  # of the size that is printed on the box, a card says it has


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)|[®™]", " ", name.lower())))


def _read() -> dict[tuple[str, ...], float]:
    """The table by the words of each name; spellings such as `A100-SXM4-80GB` are three words."""
    table: dict[tuple[str, ...], float] = {}
    for entry in filter(None, re.split(r",|\n", _GB_PER_S)):
        *name, rate = entry.split()
        table[_words(" ".join(name))] = float(rate) * 1e9
    return table


_TABLE = _read()


def bandwidth(name: str, total_bytes: int) -> float | None:
    """Bytes per second of the memory of the card with this name; None if it is not known."""
    words = tuple(word for word in _words(name) if not _SIZE.fullmatch(word))
    best: tuple[int, float] | None = None
    for entry, rate in _TABLE.items():
        own = tuple(word for word in entry if not _SIZE.fullmatch(word))
        sizes = [int(match[1]) for word in entry if (match := _SIZE.fullmatch(word))]
        if any(words[i : i + len(own)] == own for i in range(len(words) - len(own) + 1)) and (
            not sizes or total_bytes >= sizes[0] * 1e9 * _NEARLY
        ):
            best = max(best or (0, 0.0), (len(entry), rate))
    return best[1] if best else None
