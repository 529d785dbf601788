"""Measures moelocal against llama.cpp's own programs on one GGUF file, in interleaved pairs, and prints the ratios.

Machines drift: clocks, caches, other people's work. So ours and theirs take turns (and turns at going first), a pair
that other work disturbed is measured again, and what counts is the median of the pairs' ratios; their spread tells how
far to trust it. Each figure comes from a process of its own with the same context, batch, threads and load settings.

- decode, prefill: tokens/s of `Session.stream` against `llama-bench` (tg128, pp512), medians within the process.
- llama-py: tokens/s of whole streamed answers (`--answer` tokens), against `llama_cpp.Llama`, in turn in one process.
- start: process start to the first byte of the answer, against `llama-completion` with its default options (it warms
  up and fits memory first) and against its leanest ones (`--no-warmup -fit off`).
- memory: peak resident bytes, against `llama-completion` on the same prompt. moelocal is a process tree, so its figure
  is the larger of the sum of the tree's proportional set sizes, polled, and of the largest process's peak as the
  kernel kept it; native programs are counted the same way.
- demo: CPU seconds (whole tree) of a 20-token answer of the bundled model, and of `moelocal --help`.

usage: python scripts/bench_native.py --native DIR --model FILE.gguf [--pairs 5] [--only decode,start] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("bench_child.py")
DEMO = ROOT / "moelocal" / "model" / "demo" / "demo.gguf"
MOELOCAL = [Path(sys.executable).with_name("moelocal")]
PROMPT = "The history of the steam engine begins with"
QUESTION = "Who are you?"
N_PREFILL, N_DECODE, N_UBATCH = 512, 128, 512  # as in llama-bench's pp512 and tg128
TESTS = ("decode", "prefill", "llama-py", "start", "memory", "demo")
LARGE_BYTES = 2_000_000_000
BUSY_SHARE = 0.1  # other work on more than this share of the CPUs makes figures doubtful

# What counts as good enough: ratios ours / native, except where a unit is named.
BOUNDS = {
    "decode": 0.97,
    "prefill": 0.97,
    "llama-py": 1.2,
    "start": 1.25,
    "start, large": 1.05,  # files over LARGE_BYTES: loading is most of it
    "memory": 80.0,  # MB more than native
    "demo run": 1.0,  # CPU seconds
    "help": 0.15,  # CPU seconds
}


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: samples of both sides in pairs; `native` may be empty when the verdict is absolute."""

    what: str
    unit: str
    ours: list[float]
    native: list[float]
    better: Literal["more", "less"]
    verdict: Literal["ratio", "difference", "absolute"] = "ratio"
    busy: float = 0.0
    note: str = ""

    @property
    def value(self) -> float:
        """The figure that is held against the bound: the median over the pairs."""
        return statistics.median(self.per_pair)

    @property
    def per_pair(self) -> list[float]:
        """Ours, or its ratio to or difference from the native figure taken beside it."""
        if self.verdict == "absolute":
            return self.ours
        pairs = zip(self.ours, self.native, strict=True)
        return [ours / native if self.verdict == "ratio" else ours - native for ours, native in pairs]

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest figure of any single pair."""
        return min(self.per_pair), max(self.per_pair)

    @property
    def ok(self) -> bool:
        """Whether the figure is within its bound, if it has one."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.better == "more" else self.value <= self.bound

    @property
    def bound(self) -> float | None:
        """What counts as good enough; None for a figure that is shown for comparison."""
        return BOUNDS.get(self.what)

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        low, high = self.spread
        return {
            "what": self.what, "unit": self.unit, "ours": self.ours, "native": self.native, "verdict": self.verdict,
            "value": self.value, "pair_min": low, "pair_max": high, "bound": self.bound, "ok": self.ok,
            "busy": self.busy, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured, and with which settings on both sides."""

    native: Path
    model: Path
    pairs: int
    reps: int
    threads: int
    repack: bool
    n_ctx: int
    temperature: float
    n_answer: int


@dataclass(frozen=True, slots=True)
class Ran:
    """A finished process and its descendants: seconds from the start, CPU seconds, peak bytes."""

    stdout: str
    first_byte_s: float
    cpu_s: float
    peak_bytes: int


def run(command: Sequence[Any], poll_memory: bool = False) -> Ran:
    """Runs a command with stdin closed and reads its stdout to the end.

    Raises:
        RuntimeError: it failed; with the end of its stderr.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT
        )
        assert child.stdout
        peaks: list[int] = [0]
        poller = threading.Thread(target=_poll_tree, args=(child.pid, peaks), daemon=True)
        if poll_memory:
            poller.start()
        first = os.read(child.stdout.fileno(), 1)
        first_byte_s = time.perf_counter() - start
        text = first + child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        child.stdout.close()
        if child.returncode != 0:
            errors.seek(0)
            tail = errors.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {child.returncode}:\n{tail}")
    peak = max(peaks[0], usage.ru_maxrss * 1024)
    return Ran(text.decode(errors="replace"), first_byte_s, usage.ru_utime + usage.ru_stime, peak)


def _poll_tree(pid: int, peaks: list[int]) -> None:
    """Keeps the largest sum of proportional set sizes of a process and its descendants, until it is gone."""
    while (n_bytes := sum(map(pss_bytes, tree(pid)))) > 0:
        peaks[0] = max(peaks[0], n_bytes)
        time.sleep(0.02)


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from tree(int(child))
    except OSError:
        return


def pss_bytes(pid: int, which: str = "Pss") -> int:
    """Proportional set size of a process; `Pss_Anon`: without mapped files. 0: it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def _cpu_seconds() -> tuple[float, float, float]:
    """CPU seconds since the boot: that the machine had, that were used, and that this program and its children used."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    hertz = os.sysconf("SC_CLK_TCK")
    own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return sum(ticks) / hertz, (sum(ticks) - ticks[3] - ticks[4]) / hertz, own


def watched(measure: Callable[[int], float], i: int) -> tuple[float, float]:
    """What `measure(i)` returns, and the share of the machine's CPU time that others used meanwhile."""
    before = _cpu_seconds()
    value = measure(i)
    had, used, own = (after - then for after, then in zip(_cpu_seconds(), before, strict=True))
    return value, max(0.0, used - own) / max(had, 0.01)


def paired(
    setup: Setup, what: str, ours: Callable[[int], float], native: Callable[[int], float]
) -> tuple[list[float], list[float], float]:
    """Samples of both sides, taking turns, and the largest share of other work during them.

    A pair that other work disturbed is measured again; after twice the pairs the least disturbed ones count.
    """
    seen: list[tuple[float, float, float]] = []  # other work, ours, native
    for i in range(2 * setup.pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        sides = {side: watched((ours, native)[side], i) for side in order}
        (a, a_busy), (b, b_busy) = sides[0], sides[1]
        seen.append((max(a_busy, b_busy), a, b))
        print(f"{what} {i + 1}: {a:.4g} against {b:.4g}, other work {seen[-1][0]:.0%}", file=sys.stderr)
        if sum(busy <= BUSY_SHARE for busy, _, _ in seen) == setup.pairs:
            break
    best = sorted(seen, key=lambda pair: pair[0])[: setup.pairs]
    return [a for _, a, _ in best], [b for _, _, b in best], best[-1][0]


def in_child(setup: Setup, what: str, seed: int) -> dict[str, Any]:
    """One run of bench_child.py."""
    spec = {
        "what": what, "model": str(setup.model), "reps": setup.reps, "pairs": setup.pairs,
        "threads": setup.threads, "repack": setup.repack,
        "temperature": setup.temperature, "seed": seed, "n_prefill": N_PREFILL, "n_decode": N_DECODE,
        "n_ubatch": N_UBATCH, "n_answer": setup.n_answer,
    }  # fmt: skip
    answer: dict[str, Any] = json.loads(run([sys.executable, CHILD, json.dumps(spec)]).stdout)
    return answer


# Tests: each gives rows of the table.


def llama_bench(setup: Setup, n_prompt: int, n_gen: int) -> float:
    """Tokens per second, the median of its repetitions."""
    sizes = ["-p", str(n_prompt), "-n", str(n_gen), "-ub", str(N_UBATCH), "-r", str(setup.reps)]
    how = ["-t", str(setup.threads), "-lm", "mmap", "--repack", str(int(setup.repack))]
    found = run([setup.native / "llama-bench", "-m", setup.model, *sizes, *how, "-o", "json"])
    return float(statistics.median(json.loads(found.stdout)[0]["samples_ts"]))


def decode(setup: Setup) -> list[Row]:
    distinct = []

    def ours(i: int) -> float:
        answer = in_child(setup, "decode", i)
        distinct.append(answer["distinct"])
        return float(answer["rate"])

    ours_s, native_s, busy = paired(setup, "decode", ours, lambda i: llama_bench(setup, 0, N_DECODE))
    note = f"{statistics.median(distinct):.0f} distinct tokens of {N_DECODE}"
    if statistics.median(distinct) < N_DECODE / 4:
        note += ": a loop keeps its experts in the CPU cache, llama-bench's random tokens do not; see --temperature"
    return [Row("decode", "tok/s", ours_s, native_s, "more", busy=busy, note=note)]


def prefill(setup: Setup) -> list[Row]:
    ours_s, native_s, busy = paired(
        setup,
        "prefill",
        lambda i: float(in_child(setup, "prefill", i)["rate"]),
        lambda i: llama_bench(setup, N_PREFILL, 0),
    )
    return [Row("prefill", "tok/s", ours_s, native_s, "more", busy=busy)]


def llama_py(setup: Setup) -> list[Row]:
    pairs = in_child(setup, "llama-py", 0)["pairs"]
    ours_s, native_s = [ours for ours, _ in pairs], [native for _, native in pairs]
    note = f"native: llama_cpp.Llama, streaming {setup.n_answer} tokens"
    return [Row("llama-py", "tok/s", ours_s, native_s, "more", note=note)]


def our_run(setup: Setup, n_tokens: int) -> list[str | Path]:
    return [
        *MOELOCAL, "run", setup.model, PROMPT, "--raw", "--max-tokens", str(n_tokens), "--temperature", "0",
        "--objective", "throughput",  # else one answer from a small file is not worth repacking, as native programs do
        "--ctx", str(setup.n_ctx), "--threads", str(setup.threads),
    ]  # fmt: skip


def native_run(setup: Setup, n_tokens: int) -> list[str | Path]:
    """llama-completion with the settings that our plan has for this model and context."""
    plan = json.loads(run([*our_run(setup, 1), "--json"]).stdout)["plan"]
    return [
        setup.native / "llama-completion", "-m", setup.model, "-p", PROMPT, "-no-cnv", "--no-display-prompt",
        "-n", str(n_tokens), "--temp", "0", "-c", str(plan["n_ctx"]), "-ub", str(plan["n_ubatch"]),
        "-t", str(plan["threads"]), "-lm", plan["load_mode"], "--repack" if plan["repack"] else "--no-repack",
    ]  # fmt: skip


def first_byte_s(command: Sequence[str | Path], _pair: int) -> float:
    """Seconds from the start of a program to the first byte of its answer."""
    return run(command).first_byte_s


def start(setup: Setup) -> list[Row]:
    """Two rows, whose samples of ours are each taken beside the native ones."""
    ours, native = our_run(setup, 1), native_run(setup, 1)
    rows = []
    name = "start, large" if setup.model.stat().st_size > LARGE_BYTES else "start"
    for what, options in ((name, []), ("start, lean", ["--no-warmup", "-fit", "off"])):
        command = [*native, *options]
        ours_s, native_s, busy = paired(setup, what, partial(first_byte_s, ours), partial(first_byte_s, command))
        rows.append(
            Row(what, "s", ours_s, native_s, "less", busy=busy, note=f"native: {' '.join(options) or 'defaults'}")
        )
    return rows


def memory(setup: Setup) -> list[Row]:
    ours, native = our_run(setup, 64), native_run(setup, 64)
    ours_s, native_s, busy = paired(
        setup,
        "memory",
        lambda i: run(ours, poll_memory=True).peak_bytes / 1e6,
        lambda i: run(native, poll_memory=True).peak_bytes / 1e6,
    )
    return [Row("memory", "MB", ours_s, native_s, "less", "difference", busy)]


def demo(setup: Setup) -> list[Row]:
    """CPU seconds; the native program beside it for comparison only."""
    common = ["-c", "512", "-t", str(setup.threads), "-n", "20", "-st"]
    native: list[str | Path] = [setup.native / "llama-completion", "-m", DEMO, "-p", QUESTION, *common]
    ours = [*MOELOCAL, "run", "demo", QUESTION, "--max-tokens", "20", "--ctx", "512", "--threads", str(setup.threads)]
    ours_s, native_s, busy = paired(setup, "demo run", lambda i: run(ours).cpu_s, lambda i: run(native).cpu_s)
    row = Row("demo run", "CPU s", ours_s, native_s, "less", "absolute", busy)
    help_s = [run([*MOELOCAL, "--help"]).cpu_s for _ in range(setup.pairs)]
    return [row, Row("help", "CPU s", help_s, [], "less", "absolute", busy)]


def table(rows: list[Row]) -> str:
    """The rows in columns, with what was wrong with them below."""
    lines = [f"{'what':12} {'unit':6} {'ours':>9} {'native':>9} {'verdict':>16} {'pairs':>18} {'bound':>9}"]
    for row in rows:
        native = f"{statistics.median(row.native):9.4g}" if row.native else f"{'-':>9}"
        verdict = f"{row.verdict:>10} {row.value:5.4g}"
        spread = "{:8.4g} .. {:<6.4g}".format(*row.spread)
        sign, verdict_on_it = ">=" if row.better == "more" else "<=", "ok" if row.ok else "NOT OK"
        bound = "" if row.bound is None else f"{sign:>3} {row.bound:<5g} {verdict_on_it}"
        ours = f"{row.what:12} {row.unit:6} {statistics.median(row.ours):9.4g}"
        lines.append(f"{ours} {native} {verdict} {spread} {bound}")
    lines += [f"{row.what}: {row.note}" for row in rows if row.note]
    for row in rows:
        if row.busy > BUSY_SHARE:
            lines.append(
                f"warning: {row.what}: other work took up to {row.busy:.0%} of the CPUs; measure again when idle"
            )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=Path, required=True, metavar="DIR", help="holds llama-bench, llama-completion")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--reps", type=int, default=3, help="runs within one process, of which the median counts")
    parser.add_argument("--only", default=",".join(TESTS), help=f"some of {','.join(TESTS)}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ctx", type=int, default=2048, help="context of start and memory")
    parser.add_argument(
        "--no-repack", action="store_true", help="decode, prefill and llama-py without repacked weights"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of decode and llama-py")
    parser.add_argument("--answer", type=int, default=512, help="tokens of llama-py's answers")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.tests = args.only.split(",")
    if unknown := set(args.tests) - set(TESTS):
        parser.error(f"unknown tests: {', '.join(sorted(unknown))}")
    return args


def main() -> int:
    args = parse_arguments()
    setup = Setup(
        args.native.resolve(), args.model.resolve(), args.pairs, args.reps, args.threads, not args.no_repack, args.ctx,
        args.temperature, args.answer,
    )  # fmt: skip
    busy = watched(lambda i: run(["sleep", str(i)]).cpu_s, 1)[1]
    print(f"load average {os.getloadavg()[0]:.2f}, {busy:.0%} of the CPUs busy", file=sys.stderr)
    if busy > BUSY_SHARE:
        print("warning: other work is running; disturbed pairs will be measured again", file=sys.stderr)
    tests = {"decode": decode, "prefill": prefill, "llama-py": llama_py, "start": start, "memory": memory, "demo": demo}
    rows = [row for name in TESTS if name in args.tests for row in tests[name](setup)]
    if args.json:
        print(
            json.dumps({"model": setup.model.name, "threads": setup.threads, "rows": [row.as_json() for row in rows]})
        )
    else:
        print(f"{setup.model.name}, {setup.threads} threads, {setup.pairs} pairs\n{table(rows)}")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
