"""Experts dropped: which ones, by hand; the file that is left, byte by byte, in the engine, and pruned again."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moelocal.build.prune import Cut, Record, is_cut, largest, look, write
from moelocal.build.saliency import Saliency, calibrate, keep_best
from moelocal.engine.session import load
from moelocal.engine.watch import Choices, Watch
from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.facts import read_facts
from moelocal.model.header import GGUFHeader, TensorInfo, read_header
from moelocal.plan.planner import Plan
from scripts.prune_table import N_QUESTIONS, ask, calibration_text, choices, watched
from tests.conftest import DEMO

Tiny = Callable[[str], Path]
PLAN = Plan(
    n_ctx=512, kv_type="f16", n_ubatch=256, threads=1, n_gpu_layers=0, repack=False, load_mode="mmap", n_outputs=256
)
RECORD = Record("reap", "demo", "abc", 3300)


def test_scores_by_hand() -> None:
    one = Saliency(3)
    choices = Choices(2, array("i", [0, 1, 1, 2]), array("f", [0.75, 0.25, 0.5, 0.5]), array("f", [4.0, 8.0, 2.0, 1.0]))
    one.add(choices)
    assert (one.n_tokens, one.counts, one.mass) == (2, [1, 2, 1], [0.75, 0.75, 0.5])
    assert one.scores("frequency") == [1.0, 2.0, 1.0]
    assert one.scores("reap") == [3.0, (2.0 + 1.0) / 2, 0.5]  # mean over its tokens of weight times norm
    assert one.scores("impact") == pytest.approx([3**0.5, 2**0.5 + 1.0, 0.5**0.5])  # their roots, summed
    one.add(choices, is_weighted=True)
    assert one.added == [3.0 + 4.0, 3.0 + 10.0, 0.5 + 1.0]
    assert one.impact == pytest.approx([3**0.5 + 2.0, 2**0.5 + 1.0 + 8**0.5 + 2**0.5, 0.5**0.5 + 1.0])
    with pytest.raises(ValueError, match="expert 3 of 3"):
        one.add(Choices(1, array("i", [3])))


@pytest.mark.parametrize(
    ("scores", "n_keep", "n_groups", "kept"),
    [
        ([1.0, 5.0, 3.0, 4.0], 2, 1, (1, 3)),
        ([1.0, 5.0, 3.0, 4.0], 2, 2, (1, 3)),
        ([9.0, 8.0, 1.0, 2.0], 2, 2, (0, 3)),  # as many of each group
        ([1.0, 1.0, 1.0, 1.0], 3, 1, (0, 1, 2)),
    ],
)
def test_the_best_are_kept(scores: list[float], n_keep: int, n_groups: int, kept: tuple[int, ...]) -> None:
    assert keep_best(scores, n_keep, n_groups) == kept


def data_of(path: Path, tensor: TensorInfo) -> bytes:
    with path.open("rb") as stream:
        stream.seek(tensor.offset)
        return stream.read(tensor.n_bytes)


def cut_of(path: Path, n_keep: int) -> Cut:
    header = read_header(path)
    experts = look(header)
    scores = {
        layer: [float((7 * i + layer) % experts.n_experts) for i in range(experts.n_experts)]
        for layer in experts.layers
    }
    kept = {layer: keep_best(values, n_keep, experts.n_groups) for layer, values in scores.items()}
    return Cut(header, experts, kept, RECORD)


def check_slices(source: Path, header: GGUFHeader, made: Path, cut: Cut) -> None:
    """Every tensor is the source's, those of experts without the dropped ones."""
    for before, after in zip(header.tensors, read_header(made).tensors, strict=True):
        assert (before.name, before.ggml_type) == (after.name, after.ggml_type)
        whole, rest = data_of(source, before), data_of(made, after)
        if not is_cut(before):
            assert whole == rest
            continue
        layer = int(before.name.split(".")[1])
        rows = np.frombuffer(whole, np.uint8).reshape(cut.experts.n_experts, -1)
        assert rows[list(cut.kept[layer])].tobytes() == rest
        assert after.shape == (*before.shape[:-1], cut.n_keep)


@pytest.mark.parametrize(
    ("geometry", "n_keep"),
    [
        ("tiny-qwen3moe", 7), ("tiny-gptoss", 3), ("tiny-deepseek2", 6), ("tiny-deepseek2-groups", 8),
        ("tiny-deepseek2-fused", 6), ("tiny-lfm2moe", 6),
    ],
)  # fmt: skip
def test_what_is_left_is_the_same_and_runs(geometry: str, n_keep: int, tiny: Tiny, tmp_path: Path) -> None:
    source, made = tiny(geometry), tmp_path / "made.gguf"
    cut = cut_of(source, n_keep)
    told: list[float] = []
    write(cut, made, told.append)
    assert told[-1] == pytest.approx(1.0) and made.stat().st_size == cut.file_bytes
    check_slices(source, cut.header, made, cut)
    header = read_header(made)
    arch = header.metadata["general.architecture"]
    assert header.metadata[f"{arch}.expert_count"] == n_keep
    assert header.metadata[f"{arch}.expert_used_count"] == cut.experts.n_used
    assert header.metadata["moelocal.prune.criterion"] is not None
    facts = read_facts(header)
    assert facts.n_experts == n_keep and facts.is_moe
    watch = Watch(outputs=True)
    with load([made], header, PLAN, watch=watch) as session:
        n_experts = dict.fromkeys(cut.experts.layers, n_keep)
        seen = calibrate(session, watch, [[(5 * i) % 500 for i in range(300)]], n_experts, told.append)
    assert all(
        sum(one.counts) == 300 * cut.experts.n_used or sum(one.counts) == 301 * cut.experts.n_used
        for one in seen.values()
    )
    assert all(all(np.isfinite(one.impact)) for one in seen.values())


def test_pruned_twice_the_record_tells_the_first_experts(tmp_path: Path) -> None:
    first = cut_of(DEMO, 12)
    write(first, tmp_path / "a.gguf", lambda _: None)
    second = cut_of(tmp_path / "a.gguf", 10)
    write(second, tmp_path / "b.gguf", lambda _: None)
    check_slices(tmp_path / "a.gguf", second.header, tmp_path / "b.gguf", second)
    ids = second._first_ids(0)
    assert ids == [first.kept[0][i] for i in second.kept[0]] and len(ids) == 10


def test_only_numbers_that_the_routing_allows(tiny: Tiny) -> None:
    assert list(look(read_header(DEMO)).counts()) == list(range(2, 16))
    groups = look(read_header(tiny("tiny-deepseek2-groups")))
    assert all(n % groups.n_groups == 0 and n >= groups.n_used for n in groups.counts())
    assert largest(lambda n: n <= 11, look(read_header(DEMO))) == 11
    assert largest(lambda n: True, look(read_header(DEMO))) == 16
    assert largest(lambda n: False, look(read_header(DEMO))) is None
    with pytest.raises(MoelocalError, match="experts"):
        look(read_header(tiny("tiny-dense")))


def test_short_texts_and_interruptions_leave_nothing(tmp_path: Path) -> None:
    watch = Watch(outputs=True)
    with load([DEMO], read_header(DEMO), PLAN, watch=watch) as session, pytest.raises(BadRequest, match="the least"):
        calibrate(session, watch, [[5] * 100], dict.fromkeys(range(4), 16), lambda _: None)

    def stop(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(cut_of(DEMO, 12), tmp_path / "a.gguf", stop)
    assert list(tmp_path.iterdir()) == []


def test_the_default_keeps_the_demos_answers(tmp_path: Path) -> None:
    """At 75 %, decided on other questions; random choices and REAP lose many of them."""
    header = read_header(DEMO)
    right: dict[str, list[int]] = {}
    for name, draws in choices([watched(calibration_text(1, 150), 1)], n_keep=12, n_random=2).items():
        right[name] = []
        for kept in draws:
            write(Cut(header, look(header), kept, RECORD), tmp_path / "made.gguf", lambda _: None, replace_it=True)
            right[name].append(sum(ask(tmp_path / "made.gguf", 1, N_QUESTIONS).right))
    assert right["impact"][0] >= 36
    assert right["impact"][0] > max(right["reap"] + right["random"])
