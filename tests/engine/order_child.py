"""Probes this machine and a worker, and predicts and measures three placements of one model, in a process of its own.

usage: python -m tests.engine.order_child FILE HOST:PORT   (prints JSON: placement -> predicted and measured seconds)
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from moelocal.engine import llama, rpc
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session, load
from moelocal.machine.hardware import detect
from moelocal.measure.probe import probe
from moelocal.model.facts import read_facts
from moelocal.model.header import read_header
from moelocal.plan.cost import Placement, Setting, predict
from moelocal.plan.planner import Plan

N_PROMPT, N_TOKENS, N_ROUNDS = 32, 24, 9


def decode_s(session: Session, seed: int) -> float:
    """Seconds per token after a short prompt."""
    sampling = Sampling(max_tokens=N_TOKENS + 1, temperature=0.0, seed=seed, ignore_eos=True)
    *_, last = session.stream([seed + 1 + i for i in range(N_PROMPT)], sampling)
    assert last.timings is not None
    return last.timings.generate_s / last.timings.generated_tokens


def main() -> None:
    path = Path(sys.argv[1])
    rpc.add_workers([sys.argv[2]])
    machine = detect(llama.devices(), llama.version())
    machine = replace(machine, speeds=probe(machine, types=("Q8_0",), budget_s=30, file_bytes=32 << 20))
    header = read_header(path)
    facts = read_facts(header)
    n = len(facts.layers)
    here, there = ("CPU",) * n, ("RPC0",) * n
    placements = {
        "all there": Placement(there, there, "RPC0"),
        "a third of the experts here": Placement(there, here[: n // 3] + there[n // 3 :], "RPC0"),
        "experts here": Placement(there, here, "RPC0"),
    }
    found: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, placement in placements.items():
            setting = Setting(placement, 256, "f16", 64, machine.cpu.cores, False, "mmap")
            predicted = predict(facts, machine, setting, N_PROMPT, N_PROMPT + N_TOKENS // 2)
            found[name] = {"predicted": 1 / predicted.decode_per_s}
            plan = Plan(256, "f16", 64, machine.cpu.cores, 0, False, "mmap", placement=placement)
            sessions[name] = stack.enter_context(load([path], header, plan))
            decode_s(sessions[name], 0)  # brings weights in
        rounds = [{name: decode_s(session, turn) for name, session in sessions.items()} for turn in range(N_ROUNDS)]
    for name in found:
        found[name]["measured"] = min(one[name] for one in rounds)  # other programs only add time
    print(json.dumps(found))


if __name__ == "__main__":
    main()
