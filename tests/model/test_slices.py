"""Ranges of experts against what gguf-py reads of the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from moelocal.model.header import read_header
from moelocal.model.slices import always_used, expert_stacks


@pytest.mark.parametrize("geometry", ["tiny-qwen3moe", "tiny-gptoss", "tiny-deepseek2-fused", "tiny-lfm2moe"])
def test_an_expert_s_range_holds_its_weights(geometry: str, tiny: Callable[[str], Path]) -> None:
    path = tiny(geometry)
    raw = path.read_bytes()
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(path).tensors}
    stacks = expert_stacks(read_header(path))
    assert stacks
    for layer, found in stacks.items():
        names = [stack.tensor.name for stack in found]
        assert "down" in names[-1] and all(name.startswith(f"blk.{layer}.") for name in names)
        for stack in found:
            for index in (0, stack.n_experts - 1):
                one = stack.expert(index)
                expected = tensors[stack.tensor.name][index].tobytes()
                assert raw[one.offset : one.offset + one.n_bytes] == expected


def test_experts_and_what_every_token_uses_share_nothing_and_leave_only_the_embedding(
    tiny: Callable[[str], Path],
) -> None:
    header = read_header(tiny("tiny-qwen3moe"))
    experts = {stack.tensor.offset for found in expert_stacks(header).values() for stack in found}
    always = {one.offset for ranges in always_used(header).values() for one in ranges}
    assert not experts & always
    rest = [tensor.name for tensor in header.tensors if tensor.offset not in experts | always]
    assert rest == ["token_embd.weight"]
