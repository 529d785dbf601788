"""What `--lossy-misses` costs and saves: a model runs a text token by token, with RAM for a share of its experts, once
exactly and once for each number of misses that may be replaced.

Shown: bytes that a token needs from the disk as a ratio to the exact run's, choices replaced, the mean KL divergence
from the exact run in nats, for how many tokens the likeliest next one is the same, and the ratio of perplexities. The
text is answers that the demo was trained to give, in its chat format (`prune_table.py`), or a file.

usage: python scripts/lossy_misses.py [FILE.gguf] [--text FILE] [--held 35,50,65,80] [--most 1,2] [--tokens 2000]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.engine import llama
from moelocal.engine.expert_cache import ResidencyStats
from moelocal.engine.session import load
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEMO = Path(__file__).parents[1] / "moelocal" / "model" / "demo" / "demo.gguf"
N_CTX = 512
PLAN = Plan(N_CTX, "f16", 64, 2, 0, False, "mmap", disk_bytes=1)
COLUMNS = ("held", "replaced at most", "hits", "bytes", "replaced", "KL", "same token", "perplexity")


class Run(NamedTuple):
    """ln p of every next token, float32[n_tokens, n_vocab]; tokens that came; the books."""

    logs: NDArray[np.float32]
    tokens: list[int]
    stats: ResidencyStats


def run(path: Path, text: str, n_tokens: int, held: float, most: int) -> Run:
    """The text, one token at a time, each context's length from an empty memory."""
    import numpy as np

    header = read_header(path)
    low = llama.api()
    logs = []
    with load([path], header, replace(PLAN, lossy_misses=most)) as session:
        residency = session.residency
        assert residency is not None
        experts = sum(size * len(residency._ranges[layer]) for layer, size in residency._bytes.items())
        residency._most_bytes = int(held * experts)
        residency._limit()
        tokens = session.tokenize(text)[:n_tokens]
        n_vocab = len(header.metadata["tokenizer.ggml.tokens"])
        for at in range(0, len(tokens), N_CTX):
            session.rewind(0)
            for token in tokens[at : at + N_CTX]:
                session.evaluate([token], one_by_one=True)
                row = np.ctypeslib.as_array(low.llama_get_logits_ith(session._context, -1), (n_vocab,)).astype(
                    np.float64
                )
                row -= row.max()
                logs.append((row - np.log(np.exp(row).sum())).astype(np.float32))
        residency.commit()
        return Run(np.array(logs), tokens, residency.stats)


def row(exact: Run, lossy: Run, held: str, most: int) -> str:
    """A line of the table."""
    import numpy as np

    kl = (np.exp(exact.logs) * (exact.logs - lossy.logs)).sum(axis=1)
    same = (exact.logs.argmax(axis=1) == lossy.logs.argmax(axis=1)).mean()
    after = np.array(exact.tokens[1:])
    loss = [-one.logs[np.arange(len(after)), after].mean() for one in (exact, lossy)]
    n_choices = lossy.stats.n_hits + lossy.stats.n_misses
    cells = (
        f"{held} %", str(most), f"{exact.stats.hit_rate:.0%} to {lossy.stats.hit_rate:.0%}",
        f"{lossy.stats.n_bytes / max(1, exact.stats.n_bytes):.2f}", f"{lossy.stats.n_replaced / n_choices:.1%}",
        f"{kl.mean():.4f}", f"{same:.1%}", f"{np.exp(loss[1] - loss[0]):.3f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=DEMO, metavar="FILE.gguf")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--held", default="35,50,65,80", help="experts that RAM holds, percent of all")
    parser.add_argument("--most", default="1,2", help="numbers of misses that may be replaced")
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    if args.text:
        text = args.text.read_text(encoding="utf-8")
    else:
        from scripts.prune_table import calibration_text

        text = calibration_text(0)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}")
    for held in args.held.split(","):
        exact = run(args.file, text, args.tokens, int(held) / 100, 0)
        for most in map(int, args.most.split(",")):
            print(row(exact, run(args.file, text, args.tokens, int(held) / 100, most), held, most), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
