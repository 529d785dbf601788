"""Compares the figures of `moelocal bench` with those of native llama-bench: the same file and settings, in pairs.

llama-bench has to be built from the source that llama-cpp-python vendors (see CONTRIBUTING.md). What counts is the
median of the pairs' ratios, ours / native, of the medians that each prints.

usage: python scripts/bench_agree.py --native DIR --model FILE.gguf [--pairs 7] [--prompt 512] [--gen 128] [--depth 0]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOUND = 0.03  # how far ours may be from native


def ours(args: argparse.Namespace, home: str) -> dict[str, float]:
    """Tokens per second by test name."""
    command = [sys.executable, "-m", "moelocal", "bench", str(args.model), "--json", "--repack", "on", "--cpu-only"]
    command += ["-p", str(args.prompt), "-n", str(args.gen), "-d", str(args.depth), "-r", str(args.repetitions)]
    command += ["--threads", str(args.threads), "--ubatch", "512", "--kv-type", "f16"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MOELOCAL_HOME": home}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return {row["test"].split(" ")[0]: row["tokens_per_s"]["median"] for row in json.loads(done.stdout)}


def native(args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second by test name."""
    command = [str(args.native / "llama-bench"), "-m", str(args.model), "-o", "json", "-ngl", "0"]
    command += ["-p", str(args.prompt), "-n", str(args.gen), "-d", str(args.depth), "-r", str(args.repetitions)]
    command += ["-t", str(args.threads), "-ub", "512", "-ctk", "f16", "-ctv", "f16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    return {
        f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": statistics.median(row["samples_ts"])
        for row in rows
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=Path, required=True, help="folder of llama-bench")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=128)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as home:
        for pair in range(args.pairs):
            if pair % 2:
                theirs = native(args)
                mine = ours(args, home)
            else:
                mine = ours(args, home)
                theirs = native(args)
            for test, value in mine.items():
                ratios.setdefault(test, []).append(value / theirs[test])
            print(f"pair {pair + 1}: {mine} {theirs}", file=sys.stderr, flush=True)
    for test, found in ratios.items():
        middle = statistics.median(found)
        verdict = "ok" if abs(middle - 1) <= BOUND else "NOT OK"
        print(f"{test}: {middle:.3f} ({min(found):.3f} to {max(found):.3f}), {len(found)} pairs: {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
