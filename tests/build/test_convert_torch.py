"""`moelocal convert` with nothing that stands in: llama.cpp's own converter as pip fetches it, torch, transformers.

Skipped where torch or transformers are not installed, or the converter cannot be fetched.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moelocal.build.converter import find_converter
from moelocal.engine.logits import chunk_logits
from moelocal.engine.session import Session, load
from moelocal.errors import MoelocalError
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan
from tests.build import torch_child
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
Run = Callable[..., "subprocess.CompletedProcess[str]"]
PLAN = Plan(
    n_ctx=512, kv_type="f16", n_ubatch=512, threads=2, n_gpu_layers=0, repack=False, load_mode="mmap", n_outputs=512
)


class Reference(NamedTuple):
    """A checkpoint, and what transformers makes of `PROBE`: tokens, float32[n_tokens, n_vocab]."""

    folder: Path
    tokens: list[int]
    logits: Any


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """Makes a checkpoint. Not by importing torch here: what it takes would stay with every later test."""
    imports = "import torch, transformers, tokenizers, safetensors"
    found = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"torch and transformers are needed: {found.stderr.strip().splitlines()[-1]}")

    def make_(n_layers: int, n_shards: int) -> Reference:
        folder = tmp_path_factory.mktemp("checkpoint") / "Tiny-MoE"
        out = folder.parent / "reference.npz"
        command = [sys.executable, torch_child.__file__, folder, out, n_layers, n_shards]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(list(folder.glob("*.safetensors"))) == n_shards
        saved = np.load(out)
        return Reference(folder, saved["tokens"].tolist(), saved["logits"])

    return make_


@pytest.fixture(scope="module")
def fetched(make: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with llama.cpp's converter in it, of which one line is changed: it tells tokenizers apart by a
    hash of what they make of a sentence, and knows published ones only. A tokenizer that it does not know counts as
    Qwen's."""
    home = tmp_path_factory.mktemp("fetched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELOCAL_HOME", str(home))
        try:
            converter = find_converter()
        except MoelocalError as error:
            pytest.skip(error.message)
    module = converter.folder / "conversion/base.py"
    source = module.read_text(encoding="utf-8")
    assert source.count("\n        res = None\n") == 1
    module.write_text(source.replace("\n        res = None\n", '\n        res = "qwen2"\n'), encoding="utf-8")
    return home


@pytest.fixture
def env(fetched: Path) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "MOELOCAL_HOME": str(fetched)}


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "moelocal", "convert", *map(str, args)]


def convert(env: dict[str, str], *args: str | Path) -> dict[str, Any]:
    """Runs the command; gives what it tells."""
    done = subprocess.run(command(*args, "--json"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def opened(path: Path) -> Session:
    return load([path], read_header(path), PLAN, one_shot=True)


def divergence(path: Path, reference: Reference) -> tuple[float, float]:
    """How far a file is from transformers: share of tokens with the same likeliest next one, mean KL divergence."""
    with opened(path) as session:
        assert session.tokenize(torch_child.PROBE) == reference.tokens
        found = np.concatenate([
            np.frombuffer(rows.floats, np.float32).reshape(rows.n, -1).copy()
            for rows in chunk_logits(session, reference.tokens, range(len(reference.tokens)))
        ])  # fmt: skip
    p, q = log_softmax(reference.logits), log_softmax(found)
    return float((p.argmax(axis=1) == q.argmax(axis=1)).mean()), float((np.exp(p) * (p - q)).sum(axis=1).mean())


def log_softmax(logits: Any) -> Any:
    """float64 of the same shape."""
    wide = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def test_a_converted_checkpoint_computes_what_transformers_does(
    make: Callable[..., Reference], env: dict[str, str], tmp_path: Path
) -> None:
    reference = make(n_layers=3, n_shards=1)
    whole, small = tmp_path / "whole.gguf", tmp_path / "small.gguf"
    told = convert(env, reference.folder, whole, "--type", "f32")
    assert told["type"] == "F32" and told["architecture"] == "Qwen3MoeForCausalLM"
    same, kl = divergence(whole, reference)
    assert same == 1 and kl < 1e-4
    told = convert(env, reference.folder, small, "--quantize", "Q8_0")
    assert told["type"] == "Q8_0" and told["types"]["Q8_0"] > 20
    with opened(small) as session:
        session.evaluate(reference.tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.gguf", "whole.gguf"]


def test_an_interrupt_leaves_nothing_and_the_next_run_the_whole(
    make: Callable[..., Reference], env: dict[str, str], tmp_path: Path
) -> None:
    """Of a checkpoint in two files, so large that the converter is still writing when it ends."""
    reference = make(n_layers=12, n_shards=2)
    out = tmp_path / "out" / "whole.gguf"
    process = subprocess.Popen(
        command(reference.folder, out, "--type", "f32"), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    end = time.monotonic() + 90
    while not any(path.stat().st_size for path in out.parent.glob(".*/*.gguf")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in said, said
    assert list(out.parent.iterdir()) == []
    convert(env, reference.folder, out, "--type", "f32")
    assert list(out.parent.iterdir()) == [out]
    same, kl = divergence(out, reference)
    assert same == 1 and kl < 1e-4
