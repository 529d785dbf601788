"""The widths of a model's activations, layer by layer: what its compute graph allocates per token. Pure.

They come from the tensors' shapes, so that an architecture needs no entry of its own unless its graph is different.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from moelocal.model.header import GGUFHeader, TensorInfo

_BEFORE_OUTPUT: dict[str, Literal["router", "experts"]] = {"arctic": "experts", "smallthinker": "router"}
# whose weights of the chosen experts need not add up to one
_UNNORMED = ("deepseek", "jamba", "llada-moe", "llama4", "nomic-bert-moe", "olmoe", "qwen2moe")

_LAYER = re.compile(r"blk\.(\d{1,9})\.(.+?)(?:\.weight)?")
Shapes = Mapping[str, tuple[int, ...]]  # of one layer's tensors, by name without `blk.N.` and `.weight`


class AttentionGraph(NamedTuple):
    """Values per token of one attention layer: queries as projected (with their gates, if any), keys, values, and the
    result before the output projection. `has_rope`: positions turn queries and keys. `latent`: MLA's (queries'
    bottleneck, rotary part of a key, latent values). `values`: as projected, or normed, or normed from the keys.
    `is_scaled`: queries by their positions, instead of turned."""

    n_head: int
    q: int
    k: int
    v: int
    out: int
    is_fused: bool = False
    has_rope: bool = True
    latent: tuple[int, int, int] | None = None  # q_rank, rope, kv_rank
    values: Literal["own", "normed", "keys"] = "own"
    is_scaled: bool = False


class RecurrentGraph(NamedTuple):
    """Values per token of a recurrent layer: projected, through the convolution, as the state's output. `state`: values
    of the state that the graph copies. `n_heads` have a decay each."""

    projected: int
    conv: int
    inner: int
    keys: int
    state: int
    kernel: int
    n_heads: int = 0

    @property
    def past(self) -> int:
        """Values that the convolution remembers."""
        return (self.kernel - 1) * self.conv

    @property
    def is_ahead(self) -> bool:
        """They are gathered before the layer's input is finished."""
        return not self.keys


class LayerGraph(NamedTuple):
    """Values per token of one layer.

    `ff`: of one expert; `n_experts` is 0 in a dense layer. `weighing`: how the chosen experts' scores become weights;
    `is_weighed_first`: weights go into the experts. `groups`: of experts, and those chosen. `adds_to_input`: the
    residual after attention, and after the FFN, takes the input's place instead of the addend's. `before_output`: what
    of the FFN runs before attention's output projection, because it starts from the layer's input. `has_...`: a norm of
    the router's own; a scale of each expert's output; one of the layer's.
    """

    n_embd: int
    attention: AttentionGraph | None
    recurrent: RecurrentGraph | None
    dense_ff: int
    shared_ff: int
    ff: int
    n_experts: int
    n_used: int
    is_gate_up_fused: bool
    has_probs_bias: bool
    weighing: Literal["plain", "normed", "softmax"]
    is_scaled: bool
    is_weighed_first: bool
    groups: tuple[int, int]
    adds_to_input: tuple[bool, bool]
    before_output: Literal["nothing", "router", "experts"]
    is_shared_gated: bool
    has_router_norm: bool
    has_expert_scale: bool
    has_output_scale: bool


class GraphFacts(NamedTuple):
    """What a model's compute graph is made of."""

    arch: str = ""
    n_embd: int = 0
    n_vocab: int = 0
    layers: tuple[LayerGraph, ...] = ()


def read_graph(header: GGUFHeader, n_used: tuple[int, ...]) -> GraphFacts:
    """The graph's widths, from the tensors' shapes and a few metadata keys.

    Args:
        n_used: experts per token, for each layer that answers.
    """
    arch = str(header.metadata.get("general.architecture", ""))
    layers: list[dict[str, tuple[int, ...]]] = [{} for _ in n_used]
    n_embd = n_vocab = 0
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight":
            n_embd, n_vocab = tensor.shape[0], tensor.shape[-1]
        _sort(tensor, layers)
    keys = _Keys(header.metadata, arch)
    graphs = tuple(_layer(keys, i, shapes, n_used[i], n_embd) for i, shapes in enumerate(layers))
    return GraphFacts(arch, n_embd, n_vocab, graphs)


def _sort(tensor: TensorInfo, layers: list[dict[str, tuple[int, ...]]]) -> None:
    match = _LAYER.fullmatch(tensor.name)
    if match and int(match[1]) < len(layers):
        layers[int(match[1])][match[2]] = tensor.shape


class _Keys(NamedTuple):
    metadata: Mapping[str, object]
    arch: str

    def number(self, key: str, layer: int, default: int = 0) -> int:
        """`<arch>.<key>`, of one layer if it is a list."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else default
        return value if isinstance(value, int) and value >= 0 else default


def _layer(keys: _Keys, index: int, shapes: Shapes, n_used: int, n_embd: int) -> LayerGraph:
    recurrent = _recurrent(keys, index, shapes, n_embd)
    is_lfm = keys.arch in ("lfm2", "lfm2moe")
    is_fused = "ffn_gate_up_exps" in shapes
    _, width, n_experts = _lengths(shapes, "ffn_gate_up_exps" if is_fused else "ffn_up_exps")
    return LayerGraph(
        n_embd=n_embd,
        attention=None if recurrent else _attention(keys, index, shapes, n_embd),
        recurrent=recurrent,
        dense_ff=_width(shapes, "ffn_up"),
        shared_ff=_width(shapes, "ffn_up_shexp"),
        ff=width // (2 if is_fused else 1),
        n_experts=n_experts,
        n_used=min(n_used, n_experts),
        is_gate_up_fused=is_fused,
        has_probs_bias="exp_probs_b.bias" in shapes or "exp_probs_b" in shapes,
        weighing=_weighing(keys),
        is_scaled=keys.metadata.get(f"{keys.arch}.expert_weights_scale", 1.0) not in (0.0, 1.0),
        is_weighed_first=keys.arch == "llama4",
        groups=(keys.number("expert_group_count", index), keys.number("expert_group_used_count", index)),
        adds_to_input=(is_lfm or bool(recurrent and recurrent.keys), is_lfm),
        before_output=_BEFORE_OUTPUT.get(keys.arch, "nothing") if n_experts else "nothing",
        is_shared_gated="ffn_gate_inp_shexp" in shapes,
        has_router_norm="ffn_gate_inp.scale" in shapes,
        has_expert_scale="ffn_down_exps.scale" in shapes,
        has_output_scale="layer_output_scale" in shapes,
    )


def _weighing(keys: _Keys) -> Literal["plain", "normed", "softmax"]:
    if keys.arch == "gpt-oss":
        return "softmax"
    return "normed" if keys.metadata.get(f"{keys.arch}.expert_weights_norm", keys.arch not in _UNNORMED) else "plain"


def _width(shapes: Shapes, name: str) -> int:
    """Values that a matrix makes of one token."""
    return math.prod(shapes[name][1:]) if name in shapes else 0


def _lengths(shapes: Shapes, name: str) -> tuple[int, int, int]:
    """The first three lengths of a tensor; 1 for those it lacks, 0 for a tensor that is not there."""
    first, second, third, *_ = (*shapes[name], 1, 1, 1) if name in shapes else (0, 0, 0)
    return first, second, third


def _attention(keys: _Keys, index: int, shapes: Shapes, n_embd: int) -> AttentionGraph:
    n_head = keys.number("attention.head_count", index, 1)
    out = _lengths(shapes, "attn_output")[0] or n_embd
    if "attn_kv_a_mqa" in shapes and "attn_k_b" in shapes:
        rank = _lengths(shapes, "attn_k_b")[1]
        rope = max(0, _width(shapes, "attn_kv_a_mqa") - rank)
        q = _width(shapes, "attn_q_b") or _width(shapes, "attn_q")
        return AttentionGraph(n_head, q, rank + rope, 0, out, latent=(_width(shapes, "attn_q_a"), rope, rank))
    if "attn_qkv" in shapes:
        kv = max(0, _width(shapes, "attn_qkv") - out) // 2
        return AttentionGraph(n_head, out, kv, kv, out, is_fused=True)
    q, k, v = (_width(shapes, name) for name in ("attn_q", "attn_k", "attn_v"))
    if keys.arch == "gemma4":
        return AttentionGraph(n_head, q, k, v or k, out, values="normed" if v else "keys")
    if keys.arch == "llama4" and index % 4 == 3:
        return AttentionGraph(n_head, q, k, v, out, has_rope=False, is_scaled=True)
    is_still = keys.arch == "smallthinker" and keys.number("attention.sliding_window", index) > 0 and index % 4 == 0
    return AttentionGraph(n_head, q, k, v or k, out, has_rope=not is_still)


def _recurrent(keys: _Keys, index: int, shapes: Shapes, n_embd: int) -> RecurrentGraph | None:
    if "shortconv.conv" in shapes:
        return RecurrentGraph(3 * n_embd, n_embd, n_embd, 0, 0, _lengths(shapes, "shortconv.conv")[0])
    if "ssm_conv1d" not in shapes:
        return None
    kernel, conv, _ = _lengths(shapes, "ssm_conv1d")
    inner = _lengths(shapes, "ssm_out")[0] or conv
    state = keys.number("ssm.state_size", index) * inner
    is_delta = "attn_qkv" in shapes  # gated delta net: queries and keys beside the values
    return RecurrentGraph(
        projected=_width(shapes, "attn_qkv" if is_delta else "ssm_in"),
        conv=conv,
        inner=inner,
        keys=max(0, conv - inner) // 2 if is_delta else 0,
        state=state,
        kernel=kernel,
        n_heads=keys.number("ssm.time_step_rank", index),
    )
