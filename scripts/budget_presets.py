"""Compares `moelocal quantize --size` with llama.cpp's presets at the presets' own sizes; prints a table.

For each preset llama-quantize makes the file, then moelocal makes one that is no larger, both with the same importance
matrix, which llama-imatrix makes of the text. llama-perplexity measures both files' KL divergence from the source. With
`--roles TYPE` it measures instead what one role alone brings in that type, the others untouched: the KL for the summed
relative errors is the role's sensitivity in moelocal/build/loss.py.

usage: python scripts/budget_presets.py --native DIR --source F16.gguf --text FILE [--chunks N] [--types Q2_K,Q4_K_M]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moelocal.build import imatrix_file, loss, quantize, sized
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import read_header

PRESETS = "Q2_K,Q3_K_M,IQ4_XS,Q4_K_M,Q5_K_M,Q6_K"
TRIES = 3  # llama-perplexity ends now and then without its last lines


class Setup(NamedTuple):
    """What is compared, and how."""

    native: Path
    source: Path
    text: Path
    folder: Path
    n_chunks: int

    @property
    def imatrix(self) -> Path:
        return self.folder / "imatrix.gguf"

    @property
    def base(self) -> Path:
        return self.folder / "source.kld"

    def run(self, program: str, *options: str | Path) -> str:
        """What a native program prints."""
        with tempfile.TemporaryFile() as out:
            command = [self.native / program, *options]
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True, stdin=subprocess.DEVNULL)
            out.seek(0)
            return out.read().decode(errors="replace")

    def score(self, model: Path, *options: str | Path) -> str:
        """What llama-perplexity prints of a model."""
        chunks = ("--chunks", str(self.n_chunks), "-c", "512", "-t", "2")
        return self.run("llama-perplexity", "-m", model, "-f", self.text, *chunks, *options)

    def kl(self, model: Path) -> float:
        """Mean KL divergence of a model from the source."""
        for _ in range(TRIES):
            text = self.score(model, "--kl-divergence", "--kl-divergence-base", self.base)
            if found := re.search(r"Mean\s+KLD:\s*([-\d.]+)", text):
                return float(found[1])
        raise SystemExit(f"llama-perplexity printed no KLD:\n{text[-2000:]}")


def prepare(setup: Setup) -> None:
    """The importance matrix, and the source's logits."""
    setup.run("llama-imatrix", "-m", setup.source, "-f", setup.text, "-c", "512", "-t", "2", "-o", setup.imatrix)
    setup.score(setup.source, "--kl-divergence-base", setup.base)


def compare(setup: Setup, presets: Sequence[str]) -> None:
    """The table."""
    job = quantize.QuantizeJob(setup.source, setup.folder / "ours.gguf", "Q4_K_M", imatrix=setup.imatrix, replace=True)
    survey = sized.surveyed(job, os.cpu_count() or 1)
    print("| preset | its bytes | its KL | bytes by budget | KL by budget | ratio | expected |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for preset in presets:
        theirs = setup.folder / "theirs.gguf"
        setup.run("llama-quantize", "--imatrix", setup.imatrix, setup.source, theirs, preset, "2")
        size = theirs.stat().st_size
        types = sized.chosen(survey, size)
        quantize.quantize(sized.with_types(job, types))
        ours = job.output.stat().st_size
        assert ours <= size
        made = {tensor.name: tensor.ggml_type for tensor in read_header(theirs).tensors}
        expected = predicted(survey, types) / predicted(survey, made)
        kls = setup.kl(theirs), setup.kl(job.output)
        cells = f"{size:,} | {kls[0]:.5f} | {ours:,} | {kls[1]:.5f} | {kls[1] / kls[0]:.2f} | {expected:.2f}"
        print(f"| {preset} | {cells} |", flush=True)


def predicted(survey: sized.Survey, types: dict[str, int]) -> float:
    """The loss that types are expected to have; of a type that was not measured, that of the next smaller one."""
    total = 0.0
    for choice in survey.choices:
        n_bytes = loss.type_bytes(survey.tensor(choice.name), types[choice.name])
        exact = [one.loss for one in choice.options if one.ggml_type == types[choice.name]]
        smaller = [one.loss for one in choice.options if one.n_bytes <= n_bytes]
        total += exact[0] if exact else min(smaller)
    return total


def roles(setup: Setup, kind: str) -> None:
    """What each role alone brings."""
    header = read_header(setup.source)
    ggml_type = next(number for number, one in GGML_TYPES.items() if one.name == kind)
    job = quantize.QuantizeJob(setup.source, setup.folder / "ours.gguf", "Q4_K_M", imatrix=setup.imatrix, replace=True)
    survey = sized.surveyed(job, os.cpu_count() or 1)
    known = {tensor.name: tensor for tensor in header.tensors}
    errors = loss.measure(header, [known[c.name] for c in survey.choices], imatrix_file.read(setup.imatrix), 2)
    grouped: dict[str, list[str]] = {}
    for choice in survey.choices:
        grouped.setdefault(re.sub(r"^blk\.\d+\.", "", choice.name), []).append(choice.name)
    print(f"| role | summed error in {kind} | KL | sensitivity |\n|---|--:|--:|--:|", flush=True)
    for role, names in grouped.items():
        types = {choice.name: known[choice.name].ggml_type for choice in survey.choices}
        types |= {name: ggml_type for name in names if ggml_type in errors[name]}
        rest = {name: GGML_TYPES[one].name for name, one in types.items()}
        quantize.quantize(replace(job, tensor_types=rest))
        error = sum(errors[name].get(ggml_type, 0.0) for name in names)
        kl = setup.kl(job.output)
        print(f"| {role} | {error:.5f} | {kl:.5f} | {kl / error if error else 0:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--native", type=Path, required=True, help="the folder of llama-quantize and its like")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=-1, help="of 512 tokens, to measure KL on; -1: all")
    parser.add_argument("--types", default=PRESETS)
    parser.add_argument("--roles", metavar="TYPE")
    typed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(typed.native, typed.source, typed.text, Path(folder), typed.chunks)
        prepare(setup)
        if typed.roles:
            roles(setup, typed.roles)
        else:
            compare(setup, typed.types.split(","))


if __name__ == "__main__":
    sys.exit(main())
