"""The MoE models that people run at home: a table in the package, and what each would be without a file of it.

    entry = find("qwen3-30b-a3b")
    entry.repo                              # 'unsloth/Qwen3-30B-A3B-GGUF'
    facts_of(entry, "Q4_K_M").total_bytes   # to plan with, offline

The table (`catalog.toml`) has each model's geometry. From it come a header like that of a real file, with every large
tensor, and from the header the facts, so that caches and states are those of `facts.py`. Types follow the rules of
llama.cpp's quantizer; repositories that mix types in other ways differ by a few percent. Biases and most norms are left
out: they are less than a thousandth.

Source: llama.cpp 0c1e57098, `load_arch_tensors` of src/models/*.cpp (shapes), src/llama-quant.cpp (types).
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from moelocal.errors import BadRequest
from moelocal.model.facts import ModelFacts, read_facts
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import GGUFHeader, TensorInfo
from moelocal.model.quants import FILE_TYPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

_TABLE = Path(__file__).with_name("catalog.toml")
_N_CLOSEST = 3
Shapes = Iterator[tuple[str, tuple[int, ...]]]

_DELTA = ("qwen3next", "qwen35moe")  # gated delta nets; their attention's queries come with gates
_FLOAT = re.compile(r"norm|ffn_gate_inp\.|conv1d|shortconv\.conv|\.bias$")  # never quantized
_MORE_BITS = re.compile(r"attn_(v|kv_b|v_b)\.|ffn_down")
_IDS = {kind.name: number for number, kind in GGML_TYPES.items()}
_FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # for odd row lengths


@dataclass(frozen=True, slots=True)
class _Mix:
    """A quantization as llama.cpp's quantizer mixes it: `base` for most tensors, `more` for values and FFN outputs, in
    the layers that get more bits or (`everywhere`) in all. `output` is for the output matrix, `fused` for fused QKV."""

    base: str
    more: str
    output: str
    fused: str
    everywhere: bool = False


_MIXES = {
    "Q2_K": _Mix("Q2_K", "Q3_K", "Q6_K", "Q2_K", True),
    "Q3_K_M": _Mix("Q3_K", "Q4_K", "Q6_K", "Q4_K", True),
    "Q4_K_S": _Mix("Q4_K", "Q4_K", "Q6_K", "Q4_K"),
    "Q4_K_M": _Mix("Q4_K", "Q6_K", "Q6_K", "Q5_K"),
    "Q5_K_M": _Mix("Q5_K", "Q6_K", "Q6_K", "Q6_K"),
    **{name: _Mix(name, name, name, name) for name in ("Q6_K", "Q8_0", "BF16", "F16")},
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The numbers that fix a model's large tensors; `catalog.toml` says what each is."""

    n_layers: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_experts: int
    n_experts_used: int
    n_ff_expert: int
    n_ff_shared: int = 0
    n_ff_dense: int = 0
    n_dense_layers: int = 0
    moe_step: int = 1
    is_tied: bool = False
    pattern: str = "*"
    traits: frozenset[str] = frozenset()
    keys: Mapping[str, Any] = field(default_factory=dict)

    def kind(self, layer: int) -> str:
        """What a layer is: `*` sees all positions, `S` slides, `M` is recurrent, `E` has experts alone."""
        return self.pattern[layer % len(self.pattern)]

    def number(self, key: str, default: int = 0) -> int:
        """One of `keys` that is a whole number."""
        return int(self.keys.get(key, default))


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the catalog.

    `repo` holds GGUF files of it, `source` is its publisher's repository. `total_params` and `active_params` are those
    of its card; `n_ctx` tokens of context as trained. `quant`: the quantization to get unless another is asked for.
    """

    name: str
    title: str
    repo: str
    source: str
    arch: str
    total_params: int
    active_params: int
    licence: str
    n_ctx: int
    good_at: str
    geometry: Geometry
    quant: str = "Q4_K_M"


@cache
def entries() -> tuple[Entry, ...]:
    """All models of the catalog, smallest first."""
    tables = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["model"]
    geometries = {table["name"]: _geometry(table["geometry"]) for table in tables if "geometry" in table}
    made = []
    for table in tables:
        own = {key: value for key, value in table.items() if key not in ("geometry", "like")}
        made.append(Entry(**own, geometry=geometries[table.get("like", table["name"])]))
    return tuple(made)


def _geometry(table: dict[str, Any]) -> Geometry:
    return Geometry(**{**table, "traits": frozenset(table.get("traits", ()))})


def find(name: str) -> Entry | None:
    """The model of that name, in upper or lower case."""
    return next((entry for entry in entries() if entry.name == name.strip().lower()), None)


def closest(name: str) -> list[str]:
    """Names that a mistyped or incomplete one may have meant, the likeliest first; at most three."""
    wanted = name.strip().lower()
    names = [entry.name for entry in entries()]
    longer = [one for one in names if len(wanted) > 1 and one.startswith(wanted)]
    similar = difflib.get_close_matches(wanted, names, n=_N_CLOSEST, cutoff=0.6)
    inside = [one for one in names if len(wanted) > 2 and wanted in one]
    return list(dict.fromkeys([*longer, *similar, *inside]))[:_N_CLOSEST]


def facts_of(entry: Entry, quant: str = "Q4_K_M") -> ModelFacts:
    """What a file of this model would hold, from its geometry alone: to plan with before anything is downloaded.

    A model that was trained in MXFP4 (gpt-oss) keeps its experts so, whatever `quant` says: with Q8_0 for the rest.

    Raises:
        BadRequest: a quantization whose mix of types is not known here.
    """
    return read_facts(header_of(entry, quant))


def header_of(entry: Entry, quant: str = "Q4_K_M") -> GGUFHeader:
    """The header that such a file would have, without a vocabulary and a template; `facts_of` for the rest."""
    quant = quant.upper()
    mix = _MIXES.get("Q8_0" if entry.quant == "MXFP4" else quant)
    if mix is None:
        raise BadRequest(
            f"The size of {entry.name} as {quant} cannot be told before it is there.", f"Known are {', '.join(_MIXES)}."
        )
    return _header(entry, mix, "MXFP4" if entry.quant == "MXFP4" else quant)


def _header(entry: Entry, mix: _Mix, quant: str) -> GGUFHeader:
    """What a parser would make of such a file."""
    geometry = entry.geometry
    tensors = [_tensor(entry, mix, -1, name, shape) for name, shape in _outer_shapes(geometry)]
    for layer in range(geometry.n_layers):
        for name, shape in _layer_shapes(entry.arch, geometry, layer):
            tensors.append(_tensor(entry, mix, layer, name, shape))
    file_type = next(number for number, label in FILE_TYPES.items() if label == quant)
    general = {"architecture": entry.arch, "name": entry.title, "file_type": file_type}
    metadata = {f"general.{key}": value for key, value in general.items()}
    metadata |= {f"{entry.arch}.{key}": value for key, value in _metadata(entry).items()}
    return GGUFHeader(metadata, tuple(tensors), 0, (), sum(tensor.n_bytes for tensor in tensors))


def _metadata(entry: Entry) -> dict[str, Any]:
    """The header's keys, without the architecture's prefix."""
    g = entry.geometry
    kinds = [g.kind(layer) for layer in range(g.n_layers)]
    alone = [g.n_ff_expert if kind == "E" else 0 for kind in kinds]
    return {
        "block_count": g.n_layers,
        "context_length": entry.n_ctx,
        "embedding_length": g.n_embd,
        "feed_forward_length": alone if any(alone) else g.n_ff_dense or g.n_ff_expert,
        "attention.head_count": g.n_head,
        "attention.head_count_kv": [g.n_head_kv if kind in "*S" else 0 for kind in kinds],
        "attention.key_length": g.head_dim,
        "attention.value_length": g.head_dim,
        "leading_dense_block_count": g.n_dense_layers,
        "expert_count": g.n_experts,
        "expert_used_count": g.n_experts_used,
        "expert_feed_forward_length": g.n_ff_expert,
        **g.keys,
    }


def _tensor(entry: Entry, mix: _Mix, layer: int, name: str, shape: tuple[int, ...]) -> TensorInfo:
    kind = GGML_TYPES[_IDS[_type_name(entry, mix, layer, name, shape)]]
    n_bytes = math.prod(shape) // kind.block_size * kind.type_bytes
    full = f"blk.{layer}.{name}" if layer >= 0 else name
    return TensorInfo(full, shape, _IDS[kind.name], 0, n_bytes)


def _type_name(entry: Entry, mix: _Mix, layer: int, name: str, shape: tuple[int, ...]) -> str:
    """The type that llama.cpp's quantizer gives a tensor.

    Source: llama.cpp 0c1e57098, src/llama-quant.cpp, llama_tensor_get_type_impl.
    """
    g = entry.geometry
    if len(shape) == 1 or _FLOAT.search(name):
        return "F32"
    if entry.quant == "MXFP4" and "_exps" in name:
        return "MXFP4"
    chosen = mix.base
    if name == "output.weight" or (name == "token_embd.weight" and g.is_tied):
        chosen = mix.output
    elif mix.base == mix.more:
        pass
    elif g.n_experts == 8 and name in ("attn_k.weight", "attn_v.weight"):
        chosen = "Q8_0"
    elif g.n_experts == 8 and name == "attn_output.weight":
        chosen = "Q5_K"
    elif name == "attn_qkv.weight":
        chosen = mix.fused
    elif _gets_more_bits(mix, name, layer, g.n_layers):
        chosen = mix.more
    return chosen if shape[0] % GGML_TYPES[_IDS[chosen]].block_size == 0 else _FALLBACK.get(chosen, "F16")


def _gets_more_bits(mix: _Mix, name: str, layer: int, n_layers: int) -> bool:
    """Whether a tensor is of the mix's better type.

    Source: llama.cpp 0c1e57098, src/llama-quant.cpp, `use_more_bits`.
    """
    if mix.everywhere:
        return bool(_MORE_BITS.match(name)) or name == "attn_output.weight"
    is_chosen = layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2
    return is_chosen and bool(_MORE_BITS.match(name))


def _outer_shapes(g: Geometry) -> Shapes:
    yield "token_embd.weight", (g.n_embd, g.n_vocab)
    yield "output_norm.weight", (g.n_embd,)
    if not g.is_tied:
        yield "output.weight", (g.n_embd, g.n_vocab)


def _layer_shapes(arch: str, g: Geometry, layer: int) -> Shapes:
    """The tensors of one layer, shapes in GGUF order (row length first)."""
    yield "attn_norm.weight", (g.n_embd,)
    kind = g.kind(layer)
    if kind == "M":
        yield from _recurrent_shapes(arch, g)
    elif arch == "deepseek2":
        yield from _latent_shapes(g)
    elif kind in "*S":
        yield from _attention_shapes(arch, g, layer)
    if arch == "nemotron_h_moe" and kind != "E":  # each layer does one thing
        return
    yield "ffn_norm.weight", (g.n_embd,)
    is_dense = layer < g.n_dense_layers or (layer + 1) % g.moe_step != 0
    if is_dense or arch == "gemma4":  # whose dense FFN runs beside the experts
        yield from _ffn_shapes(g.n_embd, g.n_ff_dense, "")
    if arch == "gemma4":
        yield "ffn_gate_inp.scale", (g.n_embd,)
        yield "ffn_down_exps.scale", (g.n_experts,)
        yield "layer_output_scale.weight", (1,)
    if not is_dense:
        yield from _expert_shapes(arch, g)


def _ffn_shapes(n_embd: int, n_ff: int, suffix: str) -> Shapes:
    yield f"ffn_gate{suffix}.weight", (n_embd, n_ff)
    yield f"ffn_up{suffix}.weight", (n_embd, n_ff)
    yield f"ffn_down{suffix}.weight", (n_ff, n_embd)


def _attention_shapes(arch: str, g: Geometry, layer: int) -> Shapes:
    """Grouped-query attention. Gemma's full layers have longer heads, and values that are their keys."""
    is_long = arch == "gemma4" and g.kind(layer) == "*"
    length = g.number("attention.key_length") if is_long else g.head_dim
    heads_kv = g.keys.get("attention.head_count_kv")
    q, kv = g.n_head * length, (heads_kv[layer] if heads_kv else g.n_head_kv) * length
    if "fused_qkv" in g.traits:
        yield "attn_qkv.weight", (g.n_embd, q + 2 * kv)
    else:
        yield "attn_q.weight", (g.n_embd, 2 * q if arch in _DELTA else q)
        yield "attn_k.weight", (g.n_embd, kv)
        if not is_long:
            yield "attn_v.weight", (g.n_embd, kv)
    yield "attn_output.weight", (q, g.n_embd)


def _latent_shapes(g: Geometry) -> Shapes:
    """DeepSeek's latent attention (MLA); older files hold the matrix for keys and values in one."""
    rank, rope = g.number("attention.kv_lora_rank"), g.number("rope.dimension_count")
    k_length = g.number("attention.key_length_mla", g.head_dim)
    v_length = g.number("attention.value_length_mla", g.number("attention.value_length"))
    if q_rank := g.number("attention.q_lora_rank"):
        yield "attn_q_a.weight", (g.n_embd, q_rank)
        yield "attn_q_b.weight", (q_rank, g.n_head * k_length)
    else:
        yield "attn_q.weight", (g.n_embd, g.n_head * k_length)
    yield "attn_kv_a_mqa.weight", (g.n_embd, rank + rope)
    if "attention.key_length_mla" in g.keys:
        yield "attn_k_b.weight", (k_length - rope, rank, g.n_head)
        yield "attn_v_b.weight", (rank, v_length, g.n_head)
    else:
        yield "attn_kv_b.weight", (rank, g.n_head * (k_length - rope + v_length))
    yield "attn_output.weight", (g.n_head * v_length, g.n_embd)


def _recurrent_shapes(arch: str, g: Geometry) -> Shapes:
    """LFM2's short convolution, Qwen's gated delta net, or Mamba 2."""
    if arch == "lfm2moe":
        yield "shortconv.in_proj.weight", (g.n_embd, 3 * g.n_embd)
        yield "shortconv.conv.weight", (g.number("shortconv.l_cache"), g.n_embd)
        yield "shortconv.out_proj.weight", (g.n_embd, g.n_embd)
        return
    inner, n_heads = g.number("ssm.inner_size"), g.number("ssm.time_step_rank")
    conv = inner + 2 * g.number("ssm.group_count") * g.number("ssm.state_size")
    if arch in _DELTA:
        yield "attn_qkv.weight", (g.n_embd, conv)
        yield "attn_gate.weight", (g.n_embd, inner)
        yield "ssm_ba.weight", (g.n_embd, 2 * n_heads)
    else:
        yield "ssm_in.weight", (g.n_embd, inner + conv + n_heads)
    yield "ssm_conv1d.weight", (g.number("ssm.conv_kernel"), conv)
    yield "ssm_out.weight", (inner, g.n_embd)


def _expert_shapes(arch: str, g: Geometry) -> Shapes:
    """Router, routed experts, shared experts. Nemotron's experts have no gates."""
    n, n_embd, n_ff = g.n_experts, g.n_embd, g.n_ff_expert
    has_gates = arch != "nemotron_h_moe"
    yield "ffn_gate_inp.weight", (n_embd, n)
    if "fused_gate_up" in g.traits:
        yield "ffn_gate_up_exps.weight", (n_embd, 2 * n_ff, n)
    else:
        if has_gates:
            yield "ffn_gate_exps.weight", (n_embd, n_ff, n)
        yield "ffn_up_exps.weight", (n_embd, n_ff, n)
    yield "ffn_down_exps.weight", (n_ff, n_embd, n)
    if "probs_bias" in g.traits:
        yield "exp_probs_b.bias", (n,)
    if "expert_bias" in g.traits:
        for name, width in (("gate", n_ff), ("up", n_ff), ("down", n_embd)):
            yield f"ffn_{name}_exps.bias", (width, n)
    if "gated_shared" in g.traits:
        yield "ffn_gate_inp_shexp.weight", (n_embd,)
    if g.n_ff_shared:
        shared = _ffn_shapes(n_embd, g.n_ff_shared, "_shexp")
        yield from (row for row in shared if has_gates or not row[0].startswith("ffn_gate"))
