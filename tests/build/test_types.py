"""The table of types, held against llama.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from moelocal.build.quantize import QuantizeJob, preview
from moelocal.build.types import BLIND, COPY, STARVING, TYPES, file_type, find_type, quant_type, tensor_type
from moelocal.engine import abi, llama
from moelocal.errors import BadRequest
from moelocal.model.ggml_types import GGML_TYPES
from tests.model.architectures import write_gguf
from tests.model.geometries import MODELS

KINDS = [kind for kind in TYPES.values() if kind.name != COPY]


def test_llama_cpp_calls_each_file_type_by_the_same_name() -> None:
    low = llama.api()
    for kind in KINDS:
        told = low.llama_ftype_name(file_type(kind)).decode().removeprefix("all ")
        size = {"S": "Small", "M": "Medium", "L": "Large"}.get(kind.name[-1], "")
        assert told.startswith((kind.name, f"{kind.main} - {size}", f"{kind.main} mix", f"{kind.main} MoE")), (
            kind.name,
            told,
        )


def test_which_tensor_types_cannot_be_made_without_importances() -> None:
    needs = abi.declare(llama.api(), "ggml_quantize_requires_imatrix", [ctypes.c_int], ctypes.c_bool)
    assert {number for number in GGML_TYPES if needs(number)} == BLIND < STARVING


@pytest.mark.slow
def test_bits_are_those_of_a_real_model(tmp_path: Path) -> None:
    """The table's bits per weight: of Qwen3-30B-A3B, as llama.cpp's own dry run has it."""
    model = MODELS["qwen3-30b-a3b"]()
    source = tmp_path / "source.gguf"
    write_gguf(source, model.arch, model.keys, model.header.tensors)
    for kind in KINDS:
        if kind.name == "IQ3_XXS":  # with an importance matrix, which it needs, it takes less than a dry run without
            continue
        planned = preview(QuantizeJob(source, tmp_path / "out.gguf", kind.name, requantize=True))
        assert planned.bits_per_weight == pytest.approx(kind.bits, abs=0.051), kind.name


@pytest.mark.parametrize(
    ("typed", "name"),
    [("q4_k_m", "Q4_K_M"), ("Q4-K-M", "Q4_K_M"), (" q4_k ", "Q4_K_M"), ("fp16", "F16"), ("mxfp4", "MXFP4_MOE")],
)
def test_names_as_people_type_them(typed: str, name: str) -> None:
    assert quant_type(typed).name == name


@pytest.mark.parametrize(("typed", "meant"), [("Q4KM", "Q4_K_M"), ("iq4xs", "IQ4_XS"), ("Q4_K_L", "Q4_K_M"), ("8", "")])
def test_a_wrong_name_gets_the_right_one(typed: str, meant: str) -> None:
    assert find_type(typed) is None
    with pytest.raises(BadRequest) as refusal:
        quant_type(typed)
    assert meant in refusal.value.hint and "--list-types" in refusal.value.hint


def test_types_of_tensors_are_not_those_of_files() -> None:
    assert GGML_TYPES[tensor_type("q6_k")].name == "Q6_K"
    with pytest.raises(BadRequest, match="mixture") as refusal:
        tensor_type("Q4_K_M")
    assert "Q4_K" in refusal.value.hint
    for typed in ("Q8_K", "I32", "nonsense", ""):
        with pytest.raises(BadRequest):
            tensor_type(typed)
