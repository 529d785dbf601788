"""Compares `moelocal eval` with llama.cpp's own llama-perplexity on the same files, text and settings; prints a table.

Quantizations are made from SOURCE by llama-quantize. For each, llama-perplexity and moelocal score the same text, and
compare it with the same saved logits, once those that llama-perplexity saved and once those that moelocal saved: so
both read both files.

usage: python scripts/eval_native.py --native DIR --source F16.gguf --text FILE [--types Q8_0,Q4_K_M] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PATTERNS = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "perplexity_stderr": r"Mean PPL\(Q\)\s*:\s*[\d.]+ ±\s*([\d.]+)",
    "kl_mean": r"Mean\s+KLD:\s*([-\d.]+)",
    "kl_stderr": r"Mean\s+KLD:\s*[-\d.]+ ±\s*([\d.]+)",
    "kl_p99": r"99\.0%\s+KLD:\s*([-\d.]+)",
    "kl_p999": r"99\.9%\s+KLD:\s*([-\d.]+)",
    "kl_max": r"Maximum KLD:\s*([-\d.]+)",
    "top1_agreement": r"Same top p:\s*([\d.]+)",
}
_LABELS = {
    "perplexity": "perplexity",
    "perplexity_stderr": "its standard error",
    "kl_mean": "KL mean",
    "kl_stderr": "its standard error",
    "kl_p99": "KL 99 %",
    "kl_p999": "KL 99.9 %",
    "kl_max": "KL largest",
    "top1_agreement": "same first choice",
}
_TRIES = 3  # llama-perplexity ends now and then without its last lines


class Setup(NamedTuple):
    """What is compared, and how."""

    native: Path
    text: Path
    folder: Path
    n_ctx: int
    n_threads: int


def run_native(setup: Setup, model: Path, wanted: str, *more: str | Path) -> str:
    """The output of llama-perplexity, which must contain `wanted`."""
    options: list[str | Path] = ["-m", model, "-f", setup.text, "-c", str(setup.n_ctx), "-t", str(setup.n_threads)]
    for _ in range(_TRIES):
        with tempfile.TemporaryFile() as out:
            command = [setup.native / "llama-perplexity", *options, *more]
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True, stdin=subprocess.DEVNULL)
            out.seek(0)
            text = out.read().decode(errors="replace")
        if wanted in text:
            return text
    raise SystemExit(f"llama-perplexity printed no {wanted!r}:\n{text[-2000:]}")


def parse(text: str) -> dict[str, float]:
    """The figures in llama-perplexity's comparison."""
    found = {name: re.search(pattern, text) for name, pattern in _PATTERNS.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise SystemExit(f"llama-perplexity printed no {', '.join(missing)}")
    figures = {name: float(match[1]) for name, match in found.items() if match}
    figures["top1_agreement"] /= 100
    return figures


def run_ours(setup: Setup, model: Path, *more: str | Path) -> dict[str, Any]:
    """The figures of `moelocal eval --json`."""
    options = ["--ctx", str(setup.n_ctx), "--threads", str(setup.n_threads), "--cpu-only", "--json"]
    command = [sys.executable, "-m", "moelocal", "eval", model, "--text", setup.text, *options, *more]
    environment = {**os.environ, "MOELOCAL_HOME": str(setup.folder / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def compare(setup: Setup, model: Path, saved: Path) -> dict[str, tuple[float, float]]:
    """Each figure of a model against saved logits: (native, ours)."""
    theirs = parse(run_native(setup, model, "Same top p:", "--kl-divergence", "--kl-divergence-base", saved))
    ours = run_ours(setup, model, "--reference", saved)
    return {name: (value, float(ours[name])) for name, value in theirs.items()}


def table(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    """A Markdown table with ratios ours / native."""
    rows = ["| model, reference | figure | llama-perplexity | moelocal | ratio |", "|---|---|--:|--:|--:|"]
    for name, figures in found.items():
        for figure, (theirs, ours) in figures.items():
            ratio = f"{ours / theirs:.5f}" if theirs else "-"
            rows.append(f"| {name} | {_LABELS[figure]} | {theirs:.6f} | {ours:.6f} | {ratio} |")
    return "\n".join(rows)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=Path, required=True, help="folder of llama-perplexity and llama-quantize")
    parser.add_argument(
        "--source", type=Path, required=True, help="unquantized model: quantized here, and the reference"
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", default="Q8_0,Q4_K_M")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> int:
    given = parse_arguments()
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = Setup(given.native, given.text, folder, given.ctx, given.threads)
        theirs, ours = folder / "native.logits", folder / "moelocal.logits"
        run_native(setup, given.source, "Final estimate", "--kl-divergence-base", theirs)
        run_ours(setup, given.source, "--save-logits", ours)
        for kind in given.types.split(","):
            model = folder / f"{kind}.gguf"
            command = [given.native / "llama-quantize", given.source, model, kind]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found[f"{kind}, file of llama-perplexity"] = compare(setup, model, theirs)
            found[f"{kind}, file of moelocal"] = compare(setup, model, ours)
    print(json.dumps(found, indent=1) if given.json else table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
