"""Prints what the cost model predicts for GGUF files on this machine, and what is then measured.

Rounds of both, since a machine's speed changes by itself: in each the machine is measured anew (as `moelocal doctor
--probe` does), then every file runs, mapped and repacked. A ratio is predicted / measured of one round; medians of the
rounds are shown, and the smallest and largest. `after one`: the prediction corrected by that round's first run, as
every later plan is, against its second. With `--rpc`, one file runs in three placements between this machine and a
worker that the script starts on it, each with one thread.

usage: python scripts/foresight.py FILE.gguf ... [--settings mapped,repacked] [--rpc] [--rounds 5] [--prompt 512]
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.engine import llama, rpc
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session, load
from moelocal.machine.hardware import Machine, detect
from moelocal.measure.probe import probe
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.model.header import GGUFHeader, read_header
from moelocal.plan.calibration import Calibration, Run
from moelocal.plan.cost import Placement, Prediction, Setting, Work, predict
from moelocal.plan.planner import Plan

CPU, WORKER = "CPU", "RPC0"
COLUMNS = ("predicted", "measured", "ratio", "after one")


class Sizes(NamedTuple):
    """How much is computed in each run."""

    n_prompt: int
    n_tokens: int

    @property
    def n_depth(self) -> int:
        """Tokens in the cache while the measured ones are decoded, on average."""
        return self.n_prompt + self.n_tokens // 2


class Case(NamedTuple):
    """A file with a setting that is predicted and measured."""

    path: Path
    header: GGUFHeader
    facts: ModelFacts
    name: str
    setting: Setting


def setting_of(facts: ModelFacts, machine: Machine, placement: Placement, repack: bool, sizes: Sizes) -> Setting:
    n_ctx = sizes.n_prompt + sizes.n_tokens + 64
    return Setting(placement, n_ctx, "f16", 512, machine.cpu.cores, repack, "mmap")


def local_cases(path: Path, machine: Machine, names: Sequence[str], sizes: Sizes) -> Iterator[Case]:
    """All on the CPU."""
    header = read_header(path)
    facts = read_facts(header)
    n = len(facts.layers)
    everywhere = Placement((CPU,) * n, (CPU,) * n, CPU)
    for name in names:
        yield Case(path, header, facts, name, setting_of(facts, machine, everywhere, name == "repacked", sizes))


def remote_cases(path: Path, machine: Machine, sizes: Sizes) -> Iterator[Case]:
    """Layers on the worker; their experts there, here, and half of them here."""
    header = read_header(path)
    facts = read_facts(header)
    n = len(facts.layers)
    there = (WORKER,) * n
    for name, experts in (
        ("all on RPC0", there),
        ("half of the experts on CPU", (CPU,) * (n // 2) + there[n // 2 :]),
        ("experts on CPU", (CPU,) * n),
    ):
        placement = Placement(there, experts, WORKER)
        yield Case(path, header, facts, name, setting_of(facts, machine, placement, False, sizes))


def measure(case: Case, sizes: Sizes) -> list[tuple[float, float]]:
    """Seconds of the prompt, and of the decoded tokens, of two runs."""
    setting = case.setting
    plan = Plan(
        setting.n_ctx, setting.kv_type, setting.n_ubatch, setting.threads, 0, setting.repack, setting.load_mode,
        placement=setting.placement if setting.placement.output != CPU else None,
    )  # fmt: skip
    with load([case.path], case.header, plan) as session:
        answer(session, sizes._replace(n_tokens=8), -1)  # brings weights in
        return [answer(session, sizes, run) for run in range(2)]


def answer(session: Session, sizes: Sizes, seed: int) -> tuple[float, float]:
    """Seconds of a prompt of random tokens and of the tokens decoded after it."""
    noise = random.Random(seed)
    n_vocab = len(session.header.metadata["tokenizer.ggml.tokens"])
    tokens = [noise.randrange(n_vocab // 2) for _ in range(sizes.n_prompt)]
    sampling = Sampling(max_tokens=sizes.n_tokens + 1, temperature=0.8, seed=seed + 1, ignore_eos=True)
    *_, last = session.stream(tokens, sampling)
    assert last.timings is not None and last.timings.generated_tokens == sizes.n_tokens + 1
    return last.timings.prompt_s, last.timings.generate_s


def foresee(case: Case, machine: Machine, sizes: Sizes, runs: Sequence[Run] = ()) -> Prediction:
    """What is predicted for these sizes, with what earlier runs taught."""
    setting = case.setting
    work = Work(
        setting.kv_type, setting.n_ubatch, setting.threads, setting.repack, setting.load_mode, sizes.n_prompt,
        sizes.n_depth,
    )  # fmt: skip
    correction = Calibration(case.facts, machine, runs).correction(work, setting.placement)
    return predict(case.facts, machine, setting, sizes.n_prompt, sizes.n_depth, correction)


class Outcome(NamedTuple):
    """Tokens per second of one round: predicted, measured, and both again once a first run had corrected it."""

    predicted: float
    measured: float
    corrected: float
    then: float

    @staticmethod
    def of(case: Case, machine: Machine, sizes: Sizes) -> tuple[Outcome, Outcome]:
        """Of decode and of prefill."""
        before = foresee(case, machine, sizes)
        (prompt_s, decode_s), then = measure(case, sizes)
        run = Run(
            case.setting, machine.ram_free_bytes, sizes.n_prompt, prompt_s, prompt_s, sizes.n_depth, sizes.n_tokens,
            decode_s, 0.0,
        )  # fmt: skip
        after = foresee(case, machine, sizes, [run])
        n_tokens, n_prompt = sizes.n_tokens, sizes.n_prompt
        return (
            Outcome(before.decode_per_s, n_tokens / decode_s, after.decode_per_s, n_tokens / then[1]),
            Outcome(before.prefill_per_s, n_prompt / prompt_s, after.prefill_per_s, n_prompt / then[0]),
        )


def row(case: Case, outcomes: Sequence[tuple[Outcome, Outcome]]) -> str:
    """Medians of the rounds: decode and prefill, predicted and measured."""
    cells = [case.path.stem, case.name]
    for rounds in zip(*outcomes, strict=True):
        cells += [f"{statistics.median(one.predicted for one in rounds):.4g}"]
        cells += [f"{statistics.median(one.measured for one in rounds):.4g}"]
        for ratios in (
            [one.predicted / one.measured for one in rounds],
            [one.corrected / one.then for one in rounds],
        ):
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {' | '.join(cells)} |"


@contextmanager
def worker() -> Iterator[str]:
    """The address of a worker on this machine, with one thread."""
    with closing(socket.socket()) as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = int(probe_socket.getsockname()[1])
    command = [sys.executable, "-m", "moelocal", "worker", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            with closing(socket.socket()) as trial:
                if not trial.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--settings", default="mapped,repacked")
    parser.add_argument("--rpc", action="store_true", help="three placements on a worker, in place of the settings")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    settings = args.settings.split(",")
    if unknown := set(settings) - {"mapped", "repacked"}:
        parser.error(f"no such setting: {', '.join(sorted(unknown))}")
    sizes = Sizes(args.prompt, args.tokens)
    with worker() if args.rpc else nullcontext() as address:
        if address:
            rpc.add_workers([address])
        machine = detect(llama.devices(), llama.version())
        if address:  # the other thread is the worker's
            machine = replace(machine, cpu=machine.cpu._replace(cores=1))
        cases = [
            case
            for path in args.files
            for case in (remote_cases(path, machine, sizes) if address else local_cases(path, machine, settings, sizes))
        ]
        outcomes: list[list[tuple[Outcome, Outcome]]] = [[] for _ in cases]
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr, flush=True)
            now = replace(machine, speeds=probe(machine))
            for case, its in zip(cases, outcomes, strict=True):
                its.append(Outcome.of(case, now, sizes))
                print(case.path.stem, case.name, *its[-1], file=sys.stderr, flush=True)
    print(f"| file | setting | decode {' | '.join(COLUMNS)} | prefill {' | '.join(COLUMNS)} |")
    print(f"|---|---|{'---:|' * 2 * len(COLUMNS)}")
    for case, its in zip(cases, outcomes, strict=True):
        print(row(case, its))
    return 0


if __name__ == "__main__":
    sys.exit(main())
