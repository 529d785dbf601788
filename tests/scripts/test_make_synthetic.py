"""Every tiny geometry is a file that llama.cpp loads, tokenizes with and decodes, past its window and its batch."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import dequantize

from scripts import make_synthetic as synthetic

# In a child: some malformed files abort the process that loads them.
CHILD = """
import ctypes, json, sys
import llama_cpp.llama_cpp as c

quiet = c.llama_log_callback(lambda level, text, data: None)
c.llama_log_set(quiet, None)
c.llama_backend_init()
model = c.llama_model_load_from_file(sys.argv[1].encode(), c.llama_model_default_params())
assert model, "the model does not load"
params = c.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch, params.swa_full = 256, 1, 1, False
context = c.llama_init_from_model(model, params)
assert context, "no context"
vocab = c.llama_model_get_vocab(model)
n_vocab = c.llama_vocab_n_tokens(vocab)
text = ("the rain in a train, 42 times\\n" * 4).encode()
ids = (c.llama_token * 200)()
n = c.llama_tokenize(vocab, text, len(text), ids, 200, False, True)
pieces = b""
for token in ids[:n]:
    buffer = ctypes.create_string_buffer(64)
    length = c.llama_token_to_piece(vocab, token, buffer, 64, 0, True)
    pieces += buffer.raw[:length]
batch, tokens, largest = c.llama_batch_get_one(ids, n), [], []
for _ in range(8):
    assert c.llama_decode(context, batch) == 0
    logits = c.llama_get_logits_ith(context, -1)[:n_vocab]
    largest.append(max(map(abs, logits)) if all(x == x for x in logits) else float("nan"))
    tokens.append(logits.index(max(logits)))
    one = (c.llama_token * 1)(tokens[-1])
    batch = c.llama_batch_get_one(one, 1)
print(json.dumps({"n": n, "same": pieces == text, "tokens": tokens, "largest": largest, "n_vocab": n_vocab}))
"""


TINY = [name for name in synthetic.GEOMETRIES if name.startswith("tiny-")]


@pytest.mark.parametrize("geometry", TINY)
def test_llama_cpp_runs_it(geometry: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synthetic.write_model(geometry, path)
    assert path.stat().st_size < 8e6
    child = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    seen = json.loads(child.stdout)
    assert seen["n"] > 40  # more than the smallest sliding window
    assert seen["same"]
    assert seen["n_vocab"] == 600
    assert all(0 < x < 100 for x in seen["largest"])
    assert len(set(seen["tokens"])) > 2  # an answer, not one token over and over


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        synthetic.write_model("tiny-dense", path, seed)
    a, b, c = (path.read_bytes() for path in paths)
    assert a == b
    assert a != c


def test_real_geometries_have_the_published_sizes() -> None:
    """File sizes of the real Q4_K_M files, and the parameter counts in their names."""
    found = {name: synthetic.tensors(geometry) for name, geometry in synthetic.GEOMETRIES.items()}
    sizes = {name: sum(t.n_bytes for t in todo) for name, todo in found.items()}
    assert abs(sizes["qwen3-30b-a3b"] - 18.55e9) < 0.01e9
    assert abs(sizes["olmoe-1b-7b"] - 4.21e9) < 0.01e9
    n_weights = sum(math.prod(t.shape) for t in found["qwen3-30b-a3b"])
    assert abs(n_weights - 30.53e9) < 0.01e9


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.Q8_0, Type.MXFP4, Type.F16, Type.F32])
def test_random_blocks_have_the_scale_asked_for(kind: Type) -> None:
    blocks = synthetic.random_blocks(kind, 0.02, 4000, np.random.default_rng(0))
    if kind in (Type.F16, Type.F32):
        blocks = blocks.view(f"<f{blocks.shape[1]}")
    weights = dequantize(blocks, kind)
    assert np.isfinite(weights).all()
    assert abs(weights.mean()) < 0.002
    assert 0.014 < weights.std() < 0.028  # MXFP4's scales are powers of two


def test_no_made_up_token_comes_twice() -> None:
    merges = synthetic.made_up_merges(150_000)
    pieces = [a + b for a, b in merges]
    assert len(set(pieces)) == len(pieces)
    with pytest.raises(ValueError, match="made-up tokens"):
        synthetic.made_up_merges(1_000_000)


def test_a_skew_makes_routers_like_some_experts_more(tmp_path: Path) -> None:
    shares = []
    for skew in (0.0, 2.0):
        path = tmp_path / f"{skew}.gguf"
        synthetic.write_model("tiny-qwen3moe", path, skew=skew)
        command = [sys.executable, "-m", "moelocal", "experts", str(path), "--json", "--text", "-"]
        text = "".join(f"{i}, the rain in a train. " for i in range(60))
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        shares.append(min(layer["top_half_share"] for layer in json.loads(done.stdout)["layers"]))
    assert shares[1] > 0.9 > shares[0]
