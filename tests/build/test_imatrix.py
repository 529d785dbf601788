"""Importance matrices: files of both formats, what is collected, going on after an interruption."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moelocal.build.imatrix import Layout, Unfinished, collect, matrix, seen_share, unseen
from moelocal.build.imatrix_file import Imatrix, Importance, read, write
from moelocal.engine.activations import Activations, Inputs
from moelocal.engine.session import load
from moelocal.errors import MoelocalError
from moelocal.model.header import read_header
from moelocal.plan.planner import Plan
from tests.conftest import DEMO

Tiny = Callable[[str], Path]
PLAN = Plan(
    n_ctx=64, kv_type="f16", n_ubatch=32, threads=1, n_gpu_layers=0, repack=False, load_mode="mmap", n_outputs=32
)
NAMES = [f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "ffn_gate_exps", "ffn_down_exps")]


def example() -> Imatrix:
    dense = Importance(np.array([[2.0, 8.0, 0.5]], np.float32), np.array([2.0], np.float32))
    experts = Importance(np.array([[4.0, 2.0], [0.0, 0.0]], np.float32), np.array([4.0, 0.0], np.float32))
    return Imatrix({"blk.0.attn_q.weight": dense, "blk.0.ffn_down_exps.weight": experts}, ("a.txt", "b"), 7, 512)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", example())
    found = read(tmp_path / "m.gguf")
    assert (found.datasets, found.n_chunks, found.chunk_size) == (("a.txt", "b"), 7, 512)
    for name, entry in example().entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums)
        assert np.array_equal(found.entries[name].counts, entry.counts)
    means = found.entries["blk.0.ffn_down_exps.weight"].means()
    assert means.tolist() == [[1.0, 0.5], [1.0, 1.0]]  # an expert that was never seen counts alike everywhere
    assert unseen(found.entries) == {0: [1]}


def test_the_older_format(tmp_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii3f", 5, 3, 5.0, 10.0, 0.0)
    (tmp_path / "old.dat").write_bytes(data + struct.pack("<ii", 5, 4) + b"text")
    found = read(tmp_path / "old.dat")
    assert found.entries["blk.0.attn_q.weight"].means().tolist() == [[1.0, 2.0, 0.0]]
    assert (found.n_chunks, found.datasets) == (5, ("text",))
    (tmp_path / "older.dat").write_bytes(data)
    assert read(tmp_path / "older.dat").n_chunks == 0


@pytest.mark.parametrize(
    "content", [b"", b"no matrix", struct.pack("<ii", 1, 1 << 30), struct.pack("<ii", 1, 3) + b"abc"]
)
def test_what_is_no_matrix_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(MoelocalError, match="no importance matrix"):
        read(tmp_path / "x")
    with pytest.raises(MoelocalError, match="no importance matrix"):
        read(DEMO)
    with pytest.raises(MoelocalError, match="cannot be read"):
        read(tmp_path / "missing")


def test_values_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    """llama.cpp's quantizer would end in the middle."""
    bad = Importance(np.array([[1.0, np.nan]], np.float32), np.ones(1, np.float32))
    write(tmp_path / "m.gguf", Imatrix({"blk.0.attn_q.weight": bad}, (), 1, 512))
    with pytest.raises(MoelocalError, match="it holds values that are no numbers") as caught:
        read(tmp_path / "m.gguf")
    assert "moelocal imatrix MODEL" in caught.value.hint


def test_one_that_was_cut_off_is_to_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "x.imatrix.gguf"
    write(path, Imatrix({"w": Importance(np.ones((1, 256), np.float32), np.ones(1, np.float32))}))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(MoelocalError, match=r"x\.imatrix\.gguf: the file ends before") as caught:
        read(path)
    assert "moelocal imatrix MODEL --force" in caught.value.hint and "--imatrix none" in caught.value.hint


def run(path: Path, tokens: list[int], unfinished: Unfinished, n_ctx: int = 64) -> tuple[Activations, list[int]]:
    activations = Activations()
    layout = Layout(tokens, n_ctx, len(tokens) // n_ctx)
    with load([path], read_header(path), PLAN, watch=activations) as session:
        return activations, [step.n_done for step in collect(session, activations, layout, unfinished)]


def test_inputs_are_counted_by_token_and_expert(tiny: Tiny) -> None:
    path = tiny("tiny-qwen3moe")
    header = read_header(path)
    activations, steps = run(path, [(7 * i) % 500 for i in range(150)], Unfinished("a"))
    assert steps == [0, 1, 2]  # the last, shorter chunk is left out
    n_used = header.metadata["qwen3moe.expert_used_count"]
    weights = {tensor.name: tensor.shape for tensor in header.tensors}
    for name, inputs in activations.tensors.items():
        n_in, n_experts = weights[name][0], weights[name][2] if "_exps" in name else 1
        assert inputs.sums.shape == (n_experts, n_in)
        assert inputs.counts.sum() == 128 * (n_used if "_exps" in name else 1)
        assert ((inputs.sums.sum(axis=1) > 0) == (inputs.counts > 0)).all()
    assert set(NAMES) <= set(activations.tensors)
    gate, up = (activations.tensors[f"blk.1.ffn_{what}_exps.weight"] for what in ("gate", "up"))
    assert np.array_equal(gate.sums, up.sums) and gate.sums is not up.sums
    # what goes into attention is normalised: the mean square of a normalised value times its norm's weight
    first = activations.tensors["blk.0.attn_q.weight"]
    assert first.sums.mean() / first.counts[0] == pytest.approx(1.0, rel=0.1)
    assert 0 < seen_share(activations.tensors) <= 1


@pytest.mark.parametrize("geometry", ["tiny-deepseek2", "tiny-gptoss", "tiny-lfm2moe", "tiny-deepseek2-fused"])
def test_other_architectures(geometry: str, tiny: Tiny) -> None:
    activations, _ = run(tiny(geometry), [(3 * i) % 500 for i in range(64)], Unfinished("b"))
    names = {tensor.name for tensor in read_header(tiny(geometry)).tensors}
    assert set(activations.tensors) <= names
    assert any("_exps" in name for name in activations.tensors)
    wanted = {name for name in names if "_exps" in name and name.endswith(".weight")}
    assert wanted <= set(activations.tensors)


def test_an_interrupted_run_goes_on_to_the_same_result(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokens = tiny("tiny-qwen3moe"), [(11 * i) % 500 for i in range(5 * 64)]
    whole, _ = run(path, tokens, Unfinished("whole"))
    monkeypatch.setattr("moelocal.build.imatrix._SAVE_S", 0.0)
    monkeypatch.setattr("moelocal.build.imatrix._SAVE_SHARE", 1e9)
    activations, layout, unfinished = Activations(), Layout(tokens, 64, 5), Unfinished("part")
    with load([path], read_header(path), PLAN, watch=activations) as session:
        for step in collect(session, activations, layout, unfinished):
            if step.n_done == 3:
                break
    assert unfinished.load() is not None
    assert run(path, tokens[:64], unfinished)[1] == [0, 1]  # fewer chunks than were done are computed anew
    again, steps = run(path, tokens, unfinished)
    assert steps[0] == 2 and steps[-1] == 5  # the third chunk was not saved yet
    for name, inputs in whole.tensors.items():
        assert np.allclose(again.tensors[name].sums, inputs.sums, rtol=1e-6)
        assert np.array_equal(again.tensors[name].counts, inputs.counts)
    made = matrix(again, layout, 5, "text")
    assert (made.n_chunks, made.chunk_size, made.datasets) == (5, 64, ("text",))
    unfinished.remove()
    assert unfinished.load() is None


def test_numbers_that_are_none_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    activations = Activations()
    with pytest.raises(MoelocalError, match="not finite"):
        activations._add("blk.0.attn_q.weight", np.array([[np.inf]], np.float32), np.array([1.0]))
    assert seen_share({"blk.0.ffn_down_exps.weight": Inputs(np.zeros((2, 1), np.float32), np.array([1.0, 0.0]))}) == 0.5
