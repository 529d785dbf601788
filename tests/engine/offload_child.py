"""Runs one model under several placements, in a process of its own: a worker that ends would end the tests with it.

usage: python -m tests.engine.offload_child FILE ENDPOINT,... PLACEMENT...   (JSON; prints a list of JSON results)
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from moelocal.engine import llama, rpc
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import load
from moelocal.model.header import read_header
from moelocal.plan.cost import Placement
from moelocal.plan.planner import Plan

PROMPT = "The quick brown fox jumps over the lazy dog and runs on. " * 4


@contextlib.contextmanager
def hearing(said: list[str]) -> Iterator[None]:
    """Collects what llama.cpp says, debug lines too."""
    write = llama.LOG.write

    def heard(level: int, text: str) -> None:
        said.append(text)
        write(level, text)

    with mock.patch.object(llama.LOG, "write", heard):
        yield


def answer(path: Path, placement: Placement) -> dict[str, Any]:
    """Tokens, logits, bytes per device and overridden tensors of one placement."""
    n_ctx, n_ubatch = 512, 64
    plan = Plan(
        n_ctx=n_ctx, kv_type="f16", n_ubatch=n_ubatch, threads=1, n_gpu_layers=0, repack=True, load_mode="mmap",
        placement=placement,
    )  # fmt: skip
    said: list[str] = []
    with hearing(said):  # debug lines name the overridden tensors
        session = load([path], read_header(path), plan)
    moved = [line.split()[1] for line in "".join(said).splitlines() if "buffer type overridden" in line]
    with session:
        prompt = session.tokenize(PROMPT)
        list(session.stream(prompt, Sampling(temperature=0.0, max_tokens=1)))
        n_vocab = session._low.llama_vocab_n_tokens(session._vocab)
        logits = session._low.llama_get_logits_ith(session._context, -1)[:n_vocab]
        sampling = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
        tokens = [chunk.token for chunk in session.stream(prompt, sampling)]
        return {"tokens": tokens, "logits": logits, "moved": moved, "use": [asdict(u) for u in session.allocated]}


def main() -> None:
    path, endpoints, *placements = sys.argv[1:]
    rpc.add_workers([endpoint for endpoint in endpoints.split(",") if endpoint])
    results = []
    for text in placements:
        made = json.loads(text)
        parts = tuple((name, device) for name, device in made["parts"])
        placement = Placement(tuple(made["layers"]), tuple(made["experts"]), made["output"], parts)
        results.append(answer(Path(path), placement))
    rpc.drop_when_silent()
    kinds = {device.name: device.kind for device in llama.devices()}
    print(json.dumps({"results": results, "kinds": kinds}))


if __name__ == "__main__":
    main()
