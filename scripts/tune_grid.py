"""Tunes a model as `moelocal tune` does, then measures every point of a grid, and compares: the tuned setting with the
grid's best, and with the planner's choice.

The grid's points are measured in rounds, one after another, since a machine's speed changes by itself; a turn is 512
tokens of prompt and 256 of answer, extrapolated from shorter ones. The points are ranked by the medians over the rounds
of seconds relative to the round's own median. In noise the best of many is better than it is, so the first few then run
again in turns with the tuned setting and the planner's: these pairs count.

usage: python scripts/tune_grid.py FILE.gguf [--minutes 5] [--rounds 3] [--last 9] [--threads 1,2] [--ubatch 256,512]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.engine import llama
from moelocal.engine.session import Session, load
from moelocal.machine.hardware import detect
from moelocal.measure.tune import N_ANSWER, Tuner
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan
from moelocal.plan.request import PlanRequest

WANTED = 1.03  # tuned / best of the grid
N_FIRST = 3  # of the grid, measured again


def measured(tuner: Tuner, points: dict[str, dict[str, Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a turn at each point, one round after another, relative to the round's median."""
    relative: dict[str, list[float]] = {name: [] for name in points}
    for i in range(rounds):
        order = sorted(points.items(), key=lambda pair: pair[1].get("repack", True))  # weights stay loaded
        seconds = {
            name: tuner.measure(tuner.plan(fields), (tuner.n_prompt, N_ANSWER))
            for name, fields in (order[::-1] if i % 2 else order)
        }
        middle = statistics.median(seconds.values())
        for name, taken in seconds.items():
            relative[name].append(taken / middle)
        print(f"round {i + 1} of {rounds} done", file=sys.stderr, flush=True)
    return relative


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--last", type=int, default=9, help="rounds with the grid's first few")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--ubatch", default="256,512")
    args = parser.parse_args()
    header = read_header(args.file)
    facts, machine = read_facts(header), detect(llama.devices(), llama.version())
    threads, ubatches = ([int(word) for word in text.split(",")] for text in (args.threads, args.ubatch))

    def open_as(plan: Plan) -> Session:
        return load([args.file], header, plan)

    tuner = Tuner(facts, machine, PlanRequest(kv_type="f16"), open_as, args.minutes * 60)
    start = time.monotonic()
    for step in tuner.run():
        told = (
            f"{1 / step.ratio.value:.3f} times as fast, {step.ratio.n_pairs} pairs" if step.ratio else "does not load"
        )
        print(f"{step.change}: {told}{', taken' if step.is_taken else ''}", file=sys.stderr, flush=True)
    outcome = tuner.outcome()
    print(f"tuned in {time.monotonic() - start:.0f} s: {outcome}", file=sys.stderr, flush=True)

    knobs: dict[str, Any] = {
        "repack": (True, False), "flash_attn": (None, False), "n_ubatch": ubatches, "threads": threads,
        "threads_batch": threads,
    }  # fmt: skip
    grid = [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]
    points: dict[str, dict[str, Any]] = {str(point): point for point in grid}
    relative = measured(tuner, points, args.rounds)
    first = sorted(points, key=lambda name: statistics.median(relative[name]))[:N_FIRST]
    ends = {"planned": {}, "tuned": outcome.fields} | {name: points[name] for name in first}
    relative = measured(tuner, ends, args.last)
    tuner.close()
    best = min(first, key=lambda name: statistics.median(relative[name]))
    print(f"best of {len(grid)}: {best}")
    print(f"tuned: {outcome.fields or 'as planned'}")
    for name, other in (("the grid's best", best), ("as planned", "planned")):
        pairs = [a / b for a, b in zip(relative["tuned"], relative[other], strict=True)]
        print(f"tuned / {name}: {statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})")
    print(f"wanted: at most {WANTED} of the grid's best, and 1.0 of what is planned")
    return 0


if __name__ == "__main__":
    sys.exit(main())
