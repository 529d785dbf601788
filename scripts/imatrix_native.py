"""Compares `moelocal imatrix` with native llama-imatrix: the same file, text and chunks.

Of each tensor the sums of squared inputs (|ours - native| / |native|) and the counts; then what native llama-quantize
makes with either matrix, tensor by tensor. llama.cpp's programs have to be built from the source that llama-cpp-python
vendors (see CONTRIBUTING.md).

usage: python scripts/imatrix_native.py --native DIR --text FILE MODEL.gguf ... [--ctx 512] [--type Q4_K_M]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moelocal.build.imatrix_file import Imatrix, read
from moelocal.model.header import read_header

_COLUMNS = ("file", "tensors", "chunks", "largest difference", "median", "counts equal", "same bytes when quantized")


def native(args: argparse.Namespace, model: Path, output: Path) -> Imatrix:
    command = [args.native / "llama-imatrix", "-m", model, "-f", args.text, "-o", output, "-ngl", "0", "--no-ppl"]
    subprocess.run([*command, "-c", str(args.ctx)], check=True, capture_output=True)
    return read(output)


def ours(args: argparse.Namespace, model: Path, output: Path) -> Imatrix:
    command = [
        sys.executable,
        "-m",
        "moelocal",
        "imatrix",
        model,
        "--text",
        args.text,
        "--output",
        output,
        "--cpu-only",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MOELOCAL_HOME": str(output.parent)}
    subprocess.run([*command, "--ctx", str(args.ctx)], check=True, capture_output=True, env=env)
    return read(output)


def differences(mine: Imatrix, theirs: Imatrix) -> list[float]:
    """Of each tensor: |ours - native| / |native|.

    Raises:
        ValueError: they have other tensors.
    """
    if set(mine.entries) != set(theirs.entries):
        raise ValueError(f"only in one: {sorted(set(mine.entries) ^ set(theirs.entries))}")
    found = []
    for name, entry in theirs.entries.items():
        a, b = mine.entries[name].sums.astype(np.float64), entry.sums.astype(np.float64)
        found.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return found


def quantized(args: argparse.Namespace, model: Path, matrix: Path, output: Path) -> dict[str, bytes]:
    """The data of each tensor that llama-quantize made."""
    command = [args.native / "llama-quantize", "--allow-requantize", "--imatrix", matrix, model, output, args.type]
    subprocess.run(command, check=True, capture_output=True)
    header = read_header(output)
    with output.open("rb") as stream:
        data = {}
        for tensor in header.tensors:
            stream.seek(tensor.offset)
            data[tensor.name] = stream.read(tensor.n_bytes)
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--native", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--type", default="Q4_K_M")
    args = parser.parse_args()
    print(f"| {' | '.join(_COLUMNS)} |\n|---|{'---:|' * (len(_COLUMNS) - 1)}", flush=True)
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{name}.gguf" for name in ("native", "ours", "quantized")]
            theirs, mine = native(args, model, files[0]), ours(args, model, files[1])
            apart = differences(mine, theirs)
            same = all(
                np.array_equal(mine.entries[name].counts, entry.counts) for name, entry in theirs.entries.items()
            )
            one, other = (quantized(args, model, matrix, files[2]) for matrix in files[:2])
            pairs = [
                (np.frombuffer(data, np.uint8), np.frombuffer(other[name], np.uint8)) for name, data in one.items()
            ]
            share = sum(int((a == b).sum()) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        cells = [model.stem, len(apart), mine.n_chunks, f"{max(apart):.1e}", f"{np.median(apart):.1e}"]
        cells += ["yes" if same else "NO", f"{share:.3%}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
