"""Prints our memory figures beside llama.cpp's own, for real models without their weights, as Markdown.

usage: python scripts/memory_table.py [--rpc] [MODEL ...]

llama.cpp's figures come from its log (`no_alloc`, files of metadata and tensor tables only). With --rpc also for layers
and experts on different devices: a worker on this machine stands for a GPU. About 15 s, with --rpc one minute.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelocal.engine.exact import exact_memory
from moelocal.model.compute import Where, Work, compute_bytes
from moelocal.model.facts import ModelFacts, kv_bytes, read_facts
from moelocal.model.kv import KVType
from moelocal.plan.cost import Placement
from moelocal.plan.planner import Plan
from tests.model.architectures import Answer, Context, ask_engine, write_gguf
from tests.model.real_numbers import REAL
from tests.workers import worker

MIB = 1 << 20
N_CTX = (4096, 16384, 65536)
KV_TYPES: tuple[KVType, ...] = ("f16", "q8_0")
WORK = [Work(n_ctx, kv_type) for kv_type in KV_TYPES for n_ctx in N_CTX]


def ask(names: Sequence[str]) -> dict[str, Answer]:
    """llama.cpp's figures for each model, in the order of WORK."""
    built = {name: REAL[name]() for name in names}
    contexts = [Context(work.n_ctx, work.n_ubatch, work.kv_type) for work in WORK]
    keys = {name: (model.arch, model.keys) for name, model in built.items()}
    tensors = {name: model.header.tensors for name, model in built.items()}
    with tempfile.TemporaryDirectory() as folder:
        return ask_engine(keys, contexts, Path(folder), tensors)


def row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def head(first: str, *others: str) -> Iterator[str]:
    yield row((first, *others))
    yield row(("---", *("---:" for _ in others)))


def percent(ours: float, theirs: float) -> float:
    return 100 * (ours / theirs - 1)


def kv_table(facts: dict[str, ModelFacts], answers: dict[str, Answer]) -> Iterator[str]:
    yield from head("model", "quant", "weights, bytes", *(f"{w.kv_type} {w.n_ctx // 1024}k" for w in WORK))
    for name, model in facts.items():
        size = model.total_bytes + model.mtp_bytes
        exact = f"{size:,}" if size == answers[name].model_bytes else f"{size:,} / {answers[name].model_bytes:,}"
        cells = []
        for work, figures in zip(WORK, answers[name].memory_mib, strict=True):
            if figures is None:
                cells.append("refused")
                continue
            ours = kv_bytes(model, work.n_ctx, work.kv_type, work.n_ubatch) / MIB
            same = abs(ours - sum(figures)) <= 0.0051 * len(figures)
            cells.append(f"{ours:,.2f}" if same else f"**{ours:,.2f} / {sum(figures):,.2f}**")
        yield row((name, model.quant, exact, *cells))


def compute_table(facts: dict[str, ModelFacts], answers: dict[str, Answer]) -> Iterator[str]:
    yield from head("model", *(f"{w.kv_type} {w.n_ctx // 1024}k" for w in WORK), "worst error")
    errors = []
    for name, model in facts.items():
        cells, worst = [], 0.0
        for work, logged in zip(WORK, answers[name].compute_mib, strict=True):
            if logged is None:
                cells.append("refused")
                continue
            ours = compute_bytes(model, work, Where.all_on("CPU", len(model.layers)))["CPU"] / MIB
            cells.append(f"{ours:,.1f} / {logged:,.1f}")
            worst = max(worst, percent(ours, logged), key=abs)
        errors.append(abs(worst))
        yield row((name, *cells, f"{worst:+.1f} %"))
    near = sum(error < 0.5 for error in errors)
    yield f"\n{near} of {len(errors)} models within 0.5 %; the worst is {max(errors):.1f} % off."


def placements(n: int) -> dict[str, Where]:
    """Placements to compare: everything there, experts here, half of the experts here, half of the layers here."""
    here, there, half = ("CPU",) * n, ("RPC0",) * n, ("RPC0",) * (n // 2) + ("CPU",) * (n - n // 2)
    return {
        "all on the device": Where(there, there, "RPC0"),
        "experts in RAM": Where(there, here, "RPC0"),
        "half of them": Where(there, half, "RPC0"),
        "half of the layers in RAM": Where(half[::-1], half[::-1], "RPC0"),
    }


def rpc_table(facts: dict[str, ModelFacts]) -> Iterator[str]:
    yield from head("model", *(f"{name}: {part}" for name in placements(0) for part in ("device", "RAM")))
    errors: list[tuple[float, str]] = []
    worst = 0.0  # MiB
    with worker() as (port, _), tempfile.TemporaryDirectory() as folder:
        for name, model in facts.items():
            real, path = REAL[name](), Path(folder) / f"{name}.gguf"
            write_gguf(path, real.arch, real.keys, real.header.tensors)
            cells = []
            for label, where in placements(len(model.layers)).items():
                placement = Placement(where.layers, where.experts, where.output)
                plan = Plan(
                    n_ctx=16384, kv_type="f16", n_ubatch=512, threads=1, n_gpu_layers=0, repack=False,
                    load_mode="none", placement=placement,
                )  # fmt: skip
                theirs = exact_memory([path], plan, [f"127.0.0.1:{port}"])
                ours = compute_bytes(model, Work(16384), where)
                ours["CPU"] += 4 * model.graph.n_vocab  # the logits' row, which `exact_memory` counts as the log does
                for device in ("RPC0", "CPU"):
                    found = theirs[device].compute_bytes
                    cells.append(f"{ours[device] / MIB:.0f} / {found / MIB:.0f}")
                    errors.append((percent(ours[device], found), f"{name}, {label}"))
                    worst = max(worst, abs(ours[device] - found) / MIB)
            yield row((name, *cells))
    far = [(error, what) for error, what in errors if abs(error) > 10]
    exact = sum(abs(error) < 0.5 for error, _ in errors)
    near = len(errors) - len(far)
    within = math.ceil(worst * 10) / 10
    yield f"\n{exact} of {len(errors)} figures within 0.5 %, {near} within 10 %, all within {within} MiB."
    yield from (f"{error:+.1f} % ({what})" for error, what in far)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rpc", action="store_true", help="also layers and experts on different devices")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(REAL)}")
    args = parser.parse_args()
    names = args.models or list(REAL)
    if unknown := [name for name in names if name not in REAL]:
        parser.error(f"no such model: {', '.join(unknown)}")
    facts = {name: read_facts(REAL[name]().header) for name in names}
    answers = ask(names)
    print("### Weights and KV cache with recurrent state, MiB\n", *kv_table(facts, answers), sep="\n")
    print("\n### Compute buffer on the CPU, ours / llama.cpp, MiB\n", *compute_table(facts, answers), sep="\n")
    if args.rpc:
        print("\n### Compute buffers by device at 16k, ours / llama.cpp, MiB\n", *rpc_table(facts), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
