"""Profiles on disk: written, read, and refused when they are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moelocal.errors import MoelocalError
from moelocal.model.header import read_header
from moelocal.model.usage import ExpertUsage, LayerUsage, identity, load_usage, profile_file, save_usage
from tests.conftest import DEMO

LAYER = LayerUsage(1, (3, 0, 5), (1.5, 0.0, 2.5), (2, 3, 1, 2), (3, 2, 1, 2))
USAGE = ExpertUsage("demo", "prose, code", 4, 2, (LAYER,))
Tiny = Callable[[str], Path]


def test_a_profile_comes_back(home: Path) -> None:
    assert load_usage("a1") is None
    assert save_usage("a1", USAGE) and load_usage("a1") == USAGE
    assert [file.name for file in (home / "profiles").iterdir()] == ["a1.json"]


def test_a_folder_that_cannot_be_written(home: Path) -> None:
    (home / "profiles").write_text("a file in its place")
    assert not save_usage("a1", USAGE) and load_usage("a1") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.update(version=1),
        lambda stored: stored.update(layers=[]),
        lambda stored: stored.update(layers=None),
        lambda stored: stored.update(n_tokens=-1),
        lambda stored: stored.update(model=7),
        lambda stored: stored.pop("text"),
        lambda stored: stored["layers"][0].update(counts=[1, 2]),
        lambda stored: stored["layers"][0].update(counts=[1, 2, True]),
        lambda stored: stored["layers"][0].update(counts=[1, 2, 10**30]),
        lambda stored: stored["layers"][0].update(mass=[1, 2, float("nan")]),
        lambda stored: stored["layers"][0].update(mass=["1", 2, 3]),
        lambda stored: stored["layers"][0].update(reuse=[1]),
        lambda stored: stored["layers"][0].pop("ranked"),
    ],
)
def test_damaged_files_are_passed_over(damage: Callable[[Any], Any]) -> None:
    save_usage("a1", USAGE)
    stored = json.loads(profile_file("a1").read_text())
    damage(stored)
    profile_file("a1").write_text(json.dumps(stored))
    assert load_usage("a1") is None


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b" " * (17 << 20)])
def test_other_files_are_passed_over(data: bytes) -> None:
    save_usage("a1", USAGE)
    profile_file("a1").write_bytes(data)
    assert load_usage("a1") is None


def test_the_identity_is_of_the_routers(tiny: Tiny, tmp_path: Path) -> None:
    def of(path: Path) -> str:
        header = read_header(path)
        return identity(header, [Path(shard) for shard in header.shards])

    copy = tmp_path / "other name.gguf"
    copy.write_bytes(DEMO.read_bytes())
    assert of(copy) == of(DEMO) and len(of(DEMO)) == 16
    assert len({of(DEMO), of(tiny("tiny-qwen3moe")), of(tiny("tiny-gptoss")), of(tiny("tiny-deepseek2"))}) == 4
    second = replace(read_header(DEMO), tensors=tuple(t._replace(shard=1) for t in read_header(DEMO).tensors))
    assert identity(second, [tmp_path / "first", DEMO]) == of(DEMO)
    changed = bytearray(DEMO.read_bytes())
    router = next(t for t in read_header(DEMO).tensors if t.name == "blk.2.ffn_gate_inp.weight")
    changed[router.offset + 5] ^= 1
    copy.write_bytes(changed)
    assert of(copy) != of(DEMO)


def test_a_dense_model_has_no_identity(tiny: Tiny) -> None:
    with pytest.raises(MoelocalError, match="no routers"):
        identity(read_header(tiny("tiny-dense")), [tiny("tiny-dense")])
