"""Compares the experts that moelocal sees chosen with those that Hugging Face transformers chooses, token by token.

For the demo's checkpoint, and for random ones of other architectures made by transformers' own classes and converted by
llama.cpp's own converter. A difference may be the consequence of an earlier one: of the same token, or of one before
it, in a layer below. For the others the gap is given: how far apart the experts' scores were, as a share of the spread
(standard deviation) of all scores there; a small gap is rounding. Prints a table.

usage: python scripts/experts_reference.py --torch PYTHON --llama-cpp DIR --demo DIR [ARCH ...] [--keep FILE]

PYTHON has torch and transformers; `--llama-cpp` is llama.cpp's source, at the engine's version (vendor/llama.cpp in the
source distribution of llama-cpp-python); `--demo` holds the demo's hf/ and demo-moe-f16.gguf. `--keep` writes the
demo's choices for the test suite (tests/data/demo_choices.json).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.engine.nodes import route
from moelocal.engine.session import load
from moelocal.engine.watch import Watch
from moelocal.measure.routing import built_in
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan
from scripts.experts_reference_child import ARCHITECTURES

_CHILD = Path(__file__).with_name("experts_reference_child.py")
_N_UBATCH = 64  # several batches a text
_COLUMNS = (
    "checkpoint", "routing", "tokens", "choices", "same", "tokens same in all layers", "own differences", "largest gap",
)  # fmt: skip


class Agreement(NamedTuple):
    """Of one model: choices (a token in a layer) that are the same sets of experts, tokens that are so in all layers,
    and the gaps of those that differ by themselves."""

    n_choices: int
    n_same: int
    n_tokens: int
    n_tokens_same: int
    gaps: tuple[float, ...]


def plan() -> Plan:
    return Plan(
        n_ctx=1024, kv_type="f16", n_ubatch=_N_UBATCH, threads=2, n_gpu_layers=0, repack=False, load_mode="mmap",
        n_outputs=_N_UBATCH,
    )  # fmt: skip


def demo_tokens(path: Path, n: int) -> list[int]:
    """The first tokens of the built-in passages."""
    with load([path], read_header(path), plan()) as session:
        text = "\n".join(passage.text[:500] for passage in built_in())
        return [session.begin or 0, *session.tokenize(text, special=False)][:n]


def ours(path: Path, tokens: Sequence[int]) -> dict[int, list[list[int]]]:
    """Each token's experts, by layer."""
    watch = Watch()
    with load([path], read_header(path), plan(), watch=watch) as session:
        for _ in route(session, watch, tokens):
            pass
    return {
        layer: [list(its.experts[at : at + its.n_used]) for at in range(0, len(its.experts), its.n_used)]
        for layer, its in watch.take().items()
    }


def compare(mine: dict[int, list[list[int]]], theirs: dict[str, Any]) -> Agreement:
    """Holds both against each other.

    Raises:
        ValueError: they have other layers or tokens.
    """
    layers = sorted(int(layer) for layer in theirs["layers"])
    if sorted(mine) != layers:
        raise ValueError(f"layers {sorted(mine)} against {layers}")
    n_tokens = len(mine[layers[0]])
    differs: set[int] = set()
    n_same, gaps = 0, []
    for layer in layers:
        below = min(differs, default=n_tokens)  # from this token on, a difference may be a consequence
        scores = theirs["scores"][str(layer)]
        pairs = zip(mine[layer], theirs["layers"][str(layer)], strict=True)
        for token, (a, b) in enumerate(pairs):
            if set(a) == set(b):
                n_same += 1
                continue
            differs.add(token)
            if token < below:
                lost, won = set(b) - set(a), set(a) - set(b)
                gap = max(scores[token][i] for i in lost) - min(scores[token][i] for i in won)
                gaps.append(abs(gap) / statistics.pstdev(scores[token]))
    return Agreement(len(layers) * n_tokens, n_same, n_tokens, n_tokens - len(differs), tuple(gaps))


def row(name: str, routing: str, found: Agreement) -> str:
    gap = f"{max(found.gaps):.2g}" if found.gaps else "-"
    cells = [
        name, routing, f"{found.n_tokens}", f"{found.n_choices:,}", f"{found.n_same / found.n_choices:.2%}",
        f"{found.n_tokens_same / found.n_tokens:.1%}", f"{len(found.gaps)}", gap,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="ARCH", help=f"of {', '.join(ARCHITECTURES)}; default all")
    parser.add_argument("--torch", required=True, metavar="PYTHON")
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    f16 = args.demo / "demo-moe-f16.gguf"
    tokens = demo_tokens(f16, args.tokens)
    print(f"| {' | '.join(_COLUMNS)} |")
    print(f"|---|---|{'---:|' * (len(_COLUMNS) - 2)}", flush=True)
    for what in ["demo", *(args.architectures or ARCHITECTURES)]:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            (work / "tokens.json").write_text(json.dumps(tokens))
            shutil.copytree(args.demo / "hf", work / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
            source = str(args.demo / "hf") if what == "demo" else what
            subprocess.run(
                [args.torch, str(_CHILD), source, str(work), str(args.llama_cpp)], check=True, capture_output=True
            )
            theirs = json.loads((work / "choices.json").read_text())
            found = compare(ours(f16 if what == "demo" else work / "model.gguf", tokens), theirs)
        routing = "softmax, weights normalised; f16" if what == "demo" else f"{ARCHITECTURES[what][0]}; f32"
        print(row(what, routing, found), flush=True)
        if what == "demo" and args.keep:
            kept = {"tokens": tokens[:200], "layers": {k: v[:200] for k, v in theirs["layers"].items()}}
            args.keep.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
