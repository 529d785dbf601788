"""llama.cpp's quantizations, and what each means for a person.

Bits per weight are those that a type makes of all weights of Qwen3-30B-A3B: they depend on the model, since llama.cpp
mixes tensor types. Quality is in words: it depends on the model too;
`moelocal eval --reference` measures it.

Source: llama.cpp 0c1e57098, tools/quantize/quantize.cpp (QUANT_OPTIONS: names, perplexity lost by Llama 3 8B),
src/llama-quant.cpp (llama_ftype_get_default_type, tensor_requires_imatrix), ggml/src/ggml.c (ggml_quantize_chunk).
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Literal, NamedTuple

from moelocal.errors import BadRequest
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.quants import FILE_TYPES

Wants = Literal["no", "helps", "advised", "required"]
COPY = "COPY"


class QuantType(NamedTuple):
    """One name that llama-quantize takes. `main`: the tensor type of most weights; `bits` per weight of the whole file;
    `imatrix`: whether it wants an importance matrix; `cpu`: speed there, from the RAM."""

    name: str
    main: str
    bits: float
    quality: str
    cpu: str
    gpu: str
    imatrix: Wants
    note: str = ""


_ROWS = (
    QuantType("F32", "F32", 32.0, "the original", "slowest", "slowest", "no", "for further work only"),
    QuantType("F16", "F16", 16.0, "the original", "slow", "slow", "no", "to quantize from"),
    QuantType("BF16", "BF16", 16.0, "the original", "slow", "slow", "no", "as most models are published"),
    QuantType("Q8_0", "Q8_0", 8.5, "as the original", "good", "good", "no"),
    QuantType("Q6_K", "Q6_K", 6.6, "nearly the original", "good", "good", "helps"),
    QuantType("Q5_K_M", "Q5_K", 5.7, "very good", "good", "good", "helps"),
    QuantType("Q5_K_S", "Q5_K", 5.5, "very good", "good", "good", "helps"),
    QuantType("Q5_1", "Q5_1", 6.0, "very good", "good", "good", "helps", "old; Q5_K_M is better"),
    QuantType("Q5_0", "Q5_0", 5.5, "very good", "good", "good", "helps", "old; Q5_K_S is better"),
    QuantType("Q4_K_M", "Q4_K", 4.9, "good", "fast", "fast", "helps", "what most people take"),
    QuantType("Q4_K_S", "Q4_K", 4.6, "good", "fast", "fast", "helps"),
    QuantType("IQ4_NL", "IQ4_NL", 4.6, "good", "fast", "fast", "advised"),
    QuantType("IQ4_XS", "IQ4_XS", 4.3, "good", "fair", "fast", "advised", "the smallest good one"),
    QuantType("Q4_1", "Q4_1", 5.0, "good", "good", "fast", "helps", "old; Q4_K_M is better"),
    QuantType("Q4_0", "Q4_0", 4.5, "fair", "fastest", "fast", "helps", "for weak CPUs"),
    QuantType("MXFP4_MOE", "MXFP4", 4.5, "fair", "fast", "fast", "no", "for models trained in it, as gpt-oss"),
    QuantType("Q3_K_L", "Q3_K", 4.2, "fair", "fair", "fast", "advised"),
    QuantType("Q3_K_M", "Q3_K", 3.9, "fair", "fair", "fast", "advised"),
    QuantType("IQ3_M", "IQ3_S", 3.5, "fair", "slow", "fast", "advised"),
    QuantType("IQ3_S", "IQ3_S", 3.5, "fair", "slow", "fast", "advised"),
    QuantType("Q3_K_S", "Q3_K", 3.5, "poor", "fair", "fast", "advised"),
    QuantType("IQ3_XS", "IQ3_S", 3.3, "fair", "slow", "fast", "required"),
    QuantType("IQ3_XXS", "IQ3_XXS", 3.1, "poor", "slow", "fast", "required"),
    QuantType("Q2_K", "Q2_K", 2.9, "poor", "fast", "fast", "advised"),
    QuantType("Q2_K_S", "Q2_K", 2.8, "poor", "fast", "fast", "required"),
    QuantType("IQ2_M", "IQ2_S", 2.7, "poor", "slow", "fast", "required"),
    QuantType("IQ2_S", "IQ2_XS", 2.4, "poor", "slow", "fast", "required"),
    QuantType("IQ2_XS", "IQ2_XS", 2.4, "bad", "slow", "fast", "required"),
    QuantType("IQ2_XXS", "IQ2_XXS", 2.1, "bad", "slow", "fast", "required"),
    QuantType("IQ1_M", "IQ1_M", 1.9, "bad", "slow", "fast", "required", "talks, no more"),
    QuantType("IQ1_S", "IQ1_S", 1.7, "bad", "slow", "fast", "required", "talks, no more"),
    QuantType("TQ2_0", "TQ2_0", 2.1, "broken", "fast", "some", "no", "only for ternary models (BitNet)"),
    QuantType("TQ1_0", "TQ1_0", 1.8, "broken", "fair", "some", "no", "only for ternary models (BitNet)"),
    QuantType("Q2_0", "Q2_0", 2.3, "broken", "fair", "fast", "no", "only for models trained in it"),
    QuantType("Q1_0", "Q1_0", 1.2, "broken", "fair", "fast", "no", "only for models trained in it"),
    QuantType(COPY, "", 0.0, "as it was", "", "", "no", "changes no tensor; joins a split model"),
)
TYPES = {row.name: row for row in _ROWS}
"""By name, from the best to the smallest."""

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32", "MXFP4": "MXFP4_MOE"}
_FILE_TYPES = {name: number for number, name in FILE_TYPES.items()} | {"MXFP4_MOE": 38}
_TENSOR_IDS = {kind.name: number for number, kind in GGML_TYPES.items()}
_NOT_MADE = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}  # types that only computations use
BLIND = frozenset(_TENSOR_IDS[name] for name in ("IQ2_XXS", "IQ2_XS", "IQ1_S"))
"""Tensor types that cannot be made at all without importances (`ggml_quantize_requires_imatrix`)."""
STARVING = BLIND | frozenset(_TENSOR_IDS[name] for name in ("IQ3_XXS", "IQ2_S", "IQ1_M"))
"""Tensor types that llama.cpp refuses to make without them, except for embeddings and output."""


def find_type(typed: str) -> QuantType | None:
    """The type of a name as typed, in any case; None: there is none."""
    name = typed.strip().upper().replace("-", "_")
    return TYPES.get(_ALIASES.get(name, name))


def quant_type(typed: str) -> QuantType:
    """The type of a name as typed.

    Raises:
        BadRequest: there is none, with those that may be meant.
    """
    if (found := find_type(typed)) is not None:
        return found
    raise _unknown(typed, "quantization", list(TYPES))


def file_type(kind: QuantType) -> int:
    """llama.cpp's number for it (llama_ftype)."""
    return _FILE_TYPES.get(kind.name, 0)  # of a copy it is not read


def tensor_type(typed: str) -> int:
    """The ggml_type of a tensor type's name as typed.

    Raises:
        BadRequest: there is none, or none that tensors can be quantized to, with those that may be meant.
    """
    name = typed.strip().upper().replace("-", "_")
    if name in _TENSOR_IDS and name not in _NOT_MADE:
        return _TENSOR_IDS[name]
    if (mix := find_type(typed)) is not None and mix.main:
        raise BadRequest(f"{mix.name} is a mixture of types for whole files.", f"For one tensor: {mix.main}")
    raise _unknown(typed, "tensor type", [name for name in _TENSOR_IDS if name not in _NOT_MADE])


def _unknown(typed: str, what: str, names: list[str]) -> BadRequest:
    word = typed.strip().upper().replace("-", "_")
    plain = {name.replace("_", ""): name for name in names}
    close = [plain[name] for name in get_close_matches(word.replace("_", ""), plain, n=3)]
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return BadRequest(f"There is no {what} {typed!r:.40}.", f"{hint}All of them: moelocal quantize --list-types")
