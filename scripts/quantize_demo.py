"""Quantizes the demo's f16 file with moelocal and with llama-quantize, asks each result 40 questions, and measures its
KL divergence from f16 on the demo's own text; prints a table.

Both use the same importance matrix: of --imatrix, or made by llama-imatrix of the demo's text.

usage: python scripts/quantize_demo.py --native DIR --source demo-f16.gguf [--imatrix FILE] [--types Q8_0,Q6_K] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.engine.conversation import prompt_tokens, reply
from moelocal.engine.prompt import Message, make_prompter
from moelocal.engine.sampling import with_advice
from moelocal.engine.session import load
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan
from scripts.demo_questions import closed_questions

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "moelocal" / "model" / "demo" / "demo.txt"
TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,IQ4_XS,Q3_K_M,Q2_K"
N_QUESTIONS = 40


class Score(NamedTuple):
    """What a file is worth: right answers of 40, KL divergence from the reference, same first choices, bytes."""

    n_right: int
    kl: float
    agreement: float
    n_bytes: int


def n_right(model: Path) -> int:
    """How many of the questions a model answers as it was taught."""
    plan = Plan(n_ctx=1024, kv_type="f16", n_ubatch=64, threads=1, n_gpu_layers=0, repack=False, load_mode="mmap")
    session = load([model], read_header(model), plan)
    prompter = make_prompter(session.header.metadata, False, session.token_text)
    sampling = with_advice({}, session.header.metadata)
    right = 0
    for question, expected in closed_questions(N_QUESTIONS):
        prompt = prompt_tokens(session, prompter, [Message("user", question)])
        right += expected == "".join(delta.text for delta in reply(session, prompter, prompt, sampling))
    session.close()
    return right


def moelocal(*words: str | Path) -> dict[str, Any]:
    """What a command prints with --json."""
    command = [sys.executable, "-m", "moelocal", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def score(model: Path, reference: Path) -> Score:
    """Asks and measures one file."""
    found = moelocal("eval", model, "--reference", reference, "--text", TEXT, "--threads", "2")
    return Score(n_right(model), found["kl_mean"], found["top1_agreement"], model.stat().st_size)


def quiet(*words: str | Path) -> None:
    """Runs a native program."""
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def table(found: dict[str, tuple[Score, Score, bool]]) -> str:
    """A Markdown table: ours, with native figures where they differ."""
    rows = [
        "| type | size | right of 40 | llama-quantize's | KL | llama-quantize's | same first choice | same bytes |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for kind, (ours, theirs, is_same) in found.items():
        rows.append(
            f"| {kind} | {ours.n_bytes / 1e6:.2f} MB | {ours.n_right} | {theirs.n_right} | {ours.kl:.5f} "
            f"| {theirs.kl:.5f} | {ours.agreement:.1%} | {'yes' if is_same else 'NO'} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=Path, required=True, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[str, tuple[Score, Score, bool]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MOELOCAL_HOME"] = str(folder / "home")
        imatrix = given.imatrix or folder / "imatrix.gguf"
        if given.imatrix is None:
            quiet(given.native / "llama-imatrix", "-m", given.source, "-f", TEXT, "-o", imatrix, "-c", "512", "-t", "2")
        for kind in given.types.split(","):
            mine, native = folder / f"{kind}.gguf", folder / f"{kind}-native.gguf"
            moelocal("quantize", given.source, mine, kind, "--imatrix", imatrix)
            quiet(given.native / "llama-quantize", "--imatrix", imatrix, given.source, native, kind, "2")
            is_same = _data(mine) == _data(native)
            found[kind] = score(mine, given.source), score(native, given.source), is_same
        found["F16"] = (original := score(given.source, given.source)), original, True
    if given.json:
        rows = {kind: [ours._asdict(), theirs._asdict(), is_same] for kind, (ours, theirs, is_same) in found.items()}
        print(json.dumps(rows, indent=1))
    else:
        print(table(found))
    return 0


def _data(path: Path) -> bytes:
    return path.read_bytes()[read_header(path).data_offset :]


if __name__ == "__main__":
    raise SystemExit(main())
