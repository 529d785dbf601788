"""Prunes the demo by each criterion of `moelocal prune` and at random, and prints what each leaves: right answers of
the 40 questions of demo_questions.py and of 200 others, and on these answers the KL divergence from the whole model and
how often the likeliest token is the same. Every figure is the median of several draws of the calibration text (of
several random choices for `random`), then the least and the most.

A calibration text has 400 questions with answers in the demo's chat format, none of which is asked. An answer is right
if greedy decoding gives it to the letter, so if every token of it is the likeliest after those before.

usage: python scripts/prune_table.py [--draws 3] [--random 5] [--keep 87.5,75,62.5,50] [--threads 2]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.build.prune import Cut, Record, look, write
from moelocal.build.saliency import Criterion, Saliency, calibrate, keep_best
from moelocal.engine.conversation import prompt_tokens
from moelocal.engine.logits import chunk_logits
from moelocal.engine.prompt import Message, make_prompter
from moelocal.engine.session import load
from moelocal.engine.watch import Watch
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan
from scripts.demo_questions import SHARES, closed_questions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logs = NDArray[np.float64]

DEMO = Path(__file__).parents[1] / "moelocal" / "model" / "demo" / "demo.gguf"
N_QUESTIONS, N_OTHERS, N_CALIBRATION = 40, 200, 400
FORMS = ".0f", ".0f", ".3f", ".1%"  # of a Score's fields
ASKED = closed_questions(N_QUESTIONS + N_OTHERS)

Kept = Mapping[int, tuple[int, ...]]


class Answers(NamedTuple):
    """Of each question whether it is answered right, and ln p of all tokens at each place of the answer."""

    right: list[bool]
    logs: list[Logs]


class Score(NamedTuple):
    """What a pruned model is worth."""

    n_right: int
    n_others_right: int
    kl: float
    agreement: float


def plan(n_threads: int) -> Plan:
    """How the demo is run."""
    return Plan(
        n_ctx=2048, kv_type="f16", n_ubatch=256, threads=n_threads, n_gpu_layers=0, repack=False, load_mode="mmap",
        n_outputs=256,
    )  # fmt: skip


def calibration_text(seed: int, n_questions: int = N_CALIBRATION) -> str:
    """Questions with answers in the demo's chat format, of the kinds and shares that it was trained on."""
    rng, asked = random.Random(seed), {question for question, _ in ASKED}
    turns: list[str] = []
    while len(turns) < n_questions:
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        question, answer = kind(rng)
        while question in asked:  # of the same kind, so that the shares stay
            question, answer = kind(rng)
        turns.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")
    return "".join(turns)


def watched(text: str, n_threads: int) -> dict[int, Saliency]:
    """What the experts do for a text."""
    header, watch = read_header(DEMO), Watch(outputs=True)
    experts = look(header)
    with load([DEMO], header, plan(n_threads), watch=watch) as session:
        tokens = session.tokenize(text, special=True)
        return calibrate(session, watch, [tokens], dict.fromkeys(experts.layers, experts.n_experts), lambda _: None)


def ask(model: Path, n_threads: int, n_questions: int = len(ASKED)) -> Answers:
    """Asks a model the first of the questions."""
    import numpy as np

    right: list[bool] = []
    logs: list[Logs] = []
    with load([model], read_header(model), plan(n_threads)) as session:
        prompter = make_prompter(session.header.metadata, False, session.token_text)
        for question, answer in ASKED[:n_questions]:
            _, prompt = prompt_tokens(session, prompter, [Message("user", question)])
            expected = list(session.tokenize(answer + "<|im_end|>", special=True))
            wanted = range(len(prompt) - 1, len(prompt) + len(expected) - 1)
            rows = np.concatenate(
                [
                    np.frombuffer(one.floats, "f4").reshape(one.n, -1).astype("f8")
                    for one in chunk_logits(session, [*prompt, *expected], wanted)
                ]
            )
            right.append(rows.argmax(axis=1).tolist() == expected)
            logs.append(rows - np.logaddexp.reduce(rows, axis=1, keepdims=True))
    return Answers(right, logs)


def score(answers: Answers, whole: Answers) -> Score:
    """Compares a model's answers with those of the whole one."""
    import numpy as np

    ours, base = np.concatenate(answers.logs), np.concatenate(whole.logs)
    kl = (np.exp(base) * (base - ours)).sum(axis=1).mean()
    agreement = (ours.argmax(axis=1) == base.argmax(axis=1)).mean()
    return Score(sum(answers.right[:N_QUESTIONS]), sum(answers.right[N_QUESTIONS:]), float(kl), float(agreement))


def choices(seen: Sequence[Mapping[int, Saliency]], n_keep: int, n_random: int) -> dict[str, list[Kept]]:
    """What each criterion keeps, for each draw."""
    found: dict[str, list[Kept]] = {
        name: [{layer: keep_best(one.scores(name), n_keep) for layer, one in draw.items()} for draw in seen]
        for name in get_args(Criterion)
    }
    n_experts = look(read_header(DEMO)).n_experts
    found["random"] = [
        {layer: tuple(sorted(rng.sample(range(n_experts), n_keep))) for layer in seen[0]}
        for rng in map(random.Random, range(n_random))
    ]
    return found


def spread(values: Sequence[float], form: str) -> str:
    """`38 (36-38)`."""
    texts = [format(value, form) for value in (statistics.median(values), min(values), max(values))]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3, help="calibration texts")
    parser.add_argument("--random", type=int, default=5, help="random choices of experts")
    parser.add_argument("--keep", default="87.5,75,62.5,50", help="percent of the experts")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    header = read_header(DEMO)
    experts, whole = look(header), ask(DEMO, given.threads)
    seen = [watched(calibration_text(seed), given.threads) for seed in range(1, given.draws + 1)]
    print(f"The whole model: {sum(whole.right[:N_QUESTIONS])} and {sum(whole.right[N_QUESTIONS:])} right.\n")
    print(f"| keep | criterion | right of {N_QUESTIONS} | right of {N_OTHERS} others | KL | same first choice |")
    print("|--:|---|--:|--:|--:|--:|")
    scores: dict[str, Score] = {}
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / "made.gguf"
        for percent in map(float, given.keep.split(",")):
            n_keep = round(experts.n_experts * percent / 100)
            for criterion, draws in choices(seen, n_keep, given.random).items():
                for kept in draws:
                    if str(kept) not in scores:
                        record = Record(criterion, DEMO.name, "", 0)
                        write(Cut(header, experts, kept, record), made, lambda _: None, replace_it=True)
                        scores[str(kept)] = score(ask(made, given.threads), whole)
                found = [scores[str(kept)] for kept in draws]
                cells = (spread(values, form) for values, form in zip(zip(*found, strict=True), FORMS, strict=True))
                print(f"| {percent:g}% | {criterion} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
