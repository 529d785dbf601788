"""Compares `moelocal quantize --size` with llama.cpp's presets at the presets' own sizes; prints a table.

For each preset llama-quantize makes the file, then moelocal makes one that is no larger, both with the same importance
matrix, which llama-imatrix makes of the text. `moelocal eval` measures both files' KL divergence from the source: on
that text, or with `--held-out FILE` on one that the matrix has not seen. With `--roles TYPE` it measures instead what
one role alone brings in that type, the others untouched: the KL for the summed relative errors is the role's
sensitivity in moelocal/build/loss.py.

usage: python scripts/budget_presets.py --native DIR --source F16.gguf --text FILE [--held-out FILE] [--chunks N]
                                        [--types Q2_K,Q4_K_M]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moelocal.build import imatrix_file, loss, quantize, sized
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import read_header

ROOT = Path(__file__).parents[1]
PRESETS = "Q2_K,Q3_K_M,IQ4_XS,Q4_K_M,Q5_K_M,Q6_K"


class Setup(NamedTuple):
    """What is compared, and how. `text`: of the importance matrix; `judged`: that KL is measured on."""

    native: Path
    source: Path
    text: Path
    judged: Path
    folder: Path
    chunks: tuple[str, ...]

    def run(self, program: str, *options: str | Path) -> None:
        """Runs a native program."""
        command = [self.native / program, *options]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)

    def evaluate(self, model: Path, *options: str | Path) -> dict[str, float]:
        """What `moelocal eval` measures of a model."""
        words = ["eval", model, "--text", self.judged, *self.chunks, "--threads", "2", "--json", *options]
        command = [sys.executable, "-m", "moelocal", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, float] = json.loads(done.stdout)
        return found

    def kl(self, model: Path) -> float:
        """Mean KL divergence of a model from the source."""
        return self.evaluate(model, "--reference", self.folder / "source.kld")["kl_mean"]

    def job(self) -> quantize.QuantizeJob:
        """What moelocal is to make; the types are still to be chosen."""
        imatrix = self.folder / "imatrix.gguf"
        return quantize.QuantizeJob(self.source, self.folder / "ours.gguf", "Q4_K_M", imatrix=imatrix, replace=True)


def prepare(setup: Setup) -> sized.Survey:
    """The importance matrix, the source's logits, and what each type loses."""
    imatrix = setup.folder / "imatrix.gguf"
    setup.run("llama-imatrix", "-m", setup.source, "-f", setup.text, "-c", "512", "-t", "2", "-o", imatrix)
    setup.evaluate(setup.source, "--save-logits", setup.folder / "source.kld")
    return sized.surveyed(setup.job(), os.cpu_count() or 1)


def compare(setup: Setup, survey: sized.Survey, presets: Sequence[str]) -> None:
    """The table of presets."""
    print("| preset | its bytes | its KL | bytes by budget | KL by budget | ratio | expected |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    job, theirs = setup.job(), setup.folder / "theirs.gguf"
    for preset in presets:
        setup.run("llama-quantize", "--imatrix", setup.folder / "imatrix.gguf", setup.source, theirs, preset, "2")
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


def predicted(survey: sized.Survey, types: Mapping[str, int]) -> float:
    """The loss that types are expected to have; of a type that was not measured, that of the next smaller one."""
    known = {tensor.name: tensor for tensor in survey.header.tensors}
    total = 0.0
    for choice in survey.choices:
        n_bytes = loss.type_bytes(known[choice.name], types[choice.name])
        exact = [one.loss for one in choice.options if one.ggml_type == types[choice.name]]
        total += exact[0] if exact else min(one.loss for one in choice.options if one.n_bytes <= n_bytes)
    return total


def roles(setup: Setup, survey: sized.Survey, kind: str) -> None:
    """The table of roles."""
    ggml_type = next(number for number, one in GGML_TYPES.items() if one.name == kind)
    known = {tensor.name: tensor for tensor in survey.header.tensors}
    names = [choice.name for choice in survey.choices]
    errors = loss.measure(
        survey.header, [known[name] for name in names], imatrix_file.read(setup.folder / "imatrix.gguf"), 2
    )
    print(f"| role | summed error in {kind} | KL | sensitivity |\n|---|--:|--:|--:|", flush=True)
    for role in dict.fromkeys(re.sub(r"^blk\.\d+\.", "", name) for name in names):
        chosen = [name for name in names if name.endswith(role) and ggml_type in errors[name]]
        types = {name: GGML_TYPES[ggml_type if name in chosen else known[name].ggml_type].name for name in names}
        quantize.quantize(replace(setup.job(), tensor_types=types))
        error, kl = sum(errors[name][ggml_type] for name in chosen), setup.kl(setup.job().output)
        print(f"| {role} | {error:.5f} | {kl:.5f} | {kl / error if error else 0:.2f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=Path, required=True, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="that the importance matrix is made of")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="text to measure KL on [the same]")
    parser.add_argument("--chunks", help="of 512 tokens, to measure KL on [all]")
    parser.add_argument("--types", default=PRESETS)
    parser.add_argument("--roles", metavar="TYPE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        chunks = ("--chunks", given.chunks) if given.chunks else ()
        texts = given.text.absolute(), (given.held_out or given.text).absolute()
        setup = Setup(given.native, given.source.absolute(), *texts, Path(name), chunks)
        survey = prepare(setup)
        if given.roles:
            roles(setup, survey, given.roles)
        else:
            compare(setup, survey, given.types.split(","))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
