"""Measures `moelocal quantize` against llama-quantize on one file: time, memory, and whether the bytes are the same.

Both take turns, and turns at going first; what counts is the median of the pairs' ratios. Ours also waits until its
file is on the disk, which llama-quantize leaves to the system;
`sync` after each run keeps one from paying for the other.
Memory is that of the process tree: proportional set sizes, polled, without pages of the source that are only mapped.

With --hashes the file tests/data/quantize_native.json is made anew: what llama-quantize makes of the bundled demo.

usage: python scripts/quantize_native.py --native DIR --source FILE.gguf [--types Q8_0,Q4_K_M] [--pairs 5] [--json]
       python scripts/quantize_native.py --native DIR --hashes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moelocal.build.types import TYPES
from moelocal.engine import llama
from scripts.bench_native import pss_bytes, tree

DEMO = ROOT / "moelocal" / "model" / "demo" / "demo.gguf"
HASHES = ROOT / "tests" / "data" / "quantize_native.json"
MB = 1_000_000


class Side(NamedTuple):
    """One run: seconds, CPU seconds of all its processes, and peak bytes of private memory."""

    seconds: float
    cpu_s: float
    peak_bytes: int


class Setup(NamedTuple):
    """What is quantized, and how."""

    native: Path
    source: Path
    folder: Path
    threads: int
    imatrix: Path | None


def commands(setup: Setup, kind: str) -> dict[str, list[str]]:
    """What is run on each side; the output is DIR/SIDE.gguf."""
    imatrix = ["--imatrix", str(setup.imatrix)] if setup.imatrix else []
    n, source = str(setup.threads), str(setup.source)
    theirs, ours = str(setup.folder / "native.gguf"), str(setup.folder / "ours.gguf")
    program = str(setup.native / "llama-quantize")
    module = [sys.executable, "-m", "moelocal", "quantize"]
    return {
        "native": [program, "--allow-requantize", *imatrix, source, theirs, kind, n],
        "ours": [*module, source, ours, kind, "--requantize", "--threads", n, *(imatrix or ["--imatrix", "none"])],
    }


def run(command: Sequence[str]) -> Side:
    """Runs a command to its end, then waits for the disk."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
        peaks = [0]
        poller = threading.Thread(target=_poll, args=(child.pid, peaks))
        poller.start()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        poller.join()
        if status:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {status}:\n{log.read()[-2000:].decode(errors='replace')}")
    os.sync()
    return Side(seconds, usage.ru_utime + usage.ru_stime, peaks[0])


def _poll(pid: int, peaks: list[int]) -> None:
    """Keeps the largest sum of private memory of a process and its descendants, until it is gone."""
    while True:
        found = [pss_bytes(one, "Pss_Anon") for one in tree(pid)]
        if not any(found):
            return
        peaks[0] = max(peaks[0], sum(found))
        time.sleep(0.05)


def compare(setup: Setup, kind: str, n_pairs: int) -> dict[str, Any]:
    """Pairs of runs for one type."""
    sides: dict[str, list[Side]] = {"native": [], "ours": []}
    is_same = False
    for pair in range(n_pairs + 1):
        wanted = commands(setup, kind)
        for name in ("native", "ours") if pair % 2 else ("ours", "native"):
            (setup.folder / f"{name}.gguf").unlink(missing_ok=True)
            side = run(wanted[name])
            if pair:  # the first one warms the page cache
                sides[name].append(side)
        if not pair:
            is_same = tensor_bytes(setup.folder / "ours.gguf") == tensor_bytes(setup.folder / "native.gguf")
    pairs = list(zip(sides["ours"], sides["native"], strict=True))
    ratios = [ours.seconds / native.seconds for ours, native in pairs]
    peaks = {name: max(side.peak_bytes for side in rows) for name, rows in sides.items()}
    return {
        "type": kind,
        "ours_s": statistics.median(side.seconds for side in sides["ours"]),
        "native_s": statistics.median(side.seconds for side in sides["native"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "cpu_ratio": statistics.median(ours.cpu_s / native.cpu_s for ours, native in pairs),
        "ours_peak_mb": peaks["ours"] / MB,
        "native_peak_mb": peaks["native"] / MB,
        "same_bytes": is_same,
    }


def tensor_bytes(path: Path) -> str:
    """A hash of a file's tensors: their table's names, shapes and types, and their data."""
    from moelocal.model.header import read_header

    header = read_header(path)
    digest = hashlib.sha256(repr([tensor[:3] for tensor in header.tensors]).encode())
    with path.open("rb") as file:
        file.seek(header.data_offset)
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_imatrix(path: Path) -> None:
    """A made-up importance matrix of the demo: each input of each expert has its own weight; expert 0 was not seen."""
    from moelocal.model.header import ValueType, read_header
    from tests.gguf_bytes import Typed, TypedArray, header_bytes

    rows: list[tuple[str, tuple[int, ...], int]] = []
    data = bytearray()
    for tensor in read_header(DEMO).tensors:
        n_in, _, n_experts = (*tensor.shape, 1, 1)[:3]
        if len(tensor.shape) < 2 or "ffn_gate_inp" in tensor.name or "token_embd" in tensor.name:
            continue
        counts = [100.0 * expert if n_experts > 1 else 100.0 for expert in range(n_experts)]
        sums = [
            count * (1 + (7 * column + 13 * expert) % 32)
            for expert, count in enumerate(counts)
            for column in range(n_in)
        ]
        for what, shape, values in (("in_sum2", (n_in, n_experts), sums), ("counts", (1, n_experts), counts)):
            rows.append((f"{tensor.name}.{what}", shape, 0))
            data += struct.pack(f"<{len(values)}f", *values)
            data += bytes(-len(data) % 32)
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": TypedArray(ValueType.STRING, ["made up"]),
        "imatrix.chunk_count": Typed(ValueType.UINT32, 10),
        "imatrix.chunk_size": Typed(ValueType.UINT32, 512),
    }
    path.write_bytes(header_bytes(keys, rows) + data)


def write_hashes(native: Path) -> None:
    """What llama-quantize makes of the demo: without an importance matrix where it can, else with the made-up one."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        out, imatrix = Path(name) / "out.gguf", Path(name) / "imatrix.gguf"
        write_imatrix(imatrix)
        for kind in TYPES.values():
            more = ["--imatrix", str(imatrix)] if kind.imatrix == "required" else []
            command = [str(native / "llama-quantize"), "--allow-requantize", *more, str(DEMO), str(out), kind.name, "2"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found[kind.name] = tensor_bytes(out)
    document = {"made by": "scripts/quantize_native.py --hashes", "system": llama.system_info(), "sha256": found}
    HASHES.write_text(json.dumps(document, indent=1) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| type | llama-quantize | moelocal | ratio | smallest, largest | CPU | memory | moelocal's | same bytes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        lines.append(
            "| {type} | {native_s:.2f} s | {ours_s:.2f} s | {ratio:.3f} | {ratio_min:.3f}, {ratio_max:.3f} "
            "| {cpu_ratio:.3f} | {native_peak_mb:.0f} MB | {ours_peak_mb:.0f} MB | {same} |".format(
                **row, same="yes" if row["same_bytes"] else "NO"
            )
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=Path, required=True, help="folder of llama-quantize")
    parser.add_argument("--source", type=Path, default=DEMO)
    parser.add_argument("--types", default="Q8_0,Q4_K_M")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where to write; its disk is measured too")
    parser.add_argument("--hashes", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.hashes:
        write_hashes(given.native)
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        setup = Setup(given.native, given.source, Path(name), given.threads, given.imatrix)
        rows = [compare(setup, kind, given.pairs) for kind in given.types.split(",")]
    print(json.dumps(rows, indent=1) if given.json else table(rows))
    return 0 if all(row["same_bytes"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
