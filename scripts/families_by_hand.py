"""MoE families that transformers has no class for: a random checkpoint with the tensor names and configuration keys of
the published ones, and what such a model computes, in float32. Written from the publications, with one switch for each
thing that sets a family apart. Needs torch and safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from scripts.families_list import N_TOKENS

N_WIDTH, N_HEADS, N_KV, N_HEAD = 256, 4, 2, 64
N_EXPERTS, N_USED, N_EXPERT_WIDTH, N_DENSE_WIDTH = 16, 4, 256, 512
N_GROUPS, N_GROUPS_USED = 4, 2
EPS, THETA = 1e-6, 10000.0
_SHAPE = {
    "hidden_size": N_WIDTH, "num_attention_heads": N_HEADS, "num_key_value_heads": N_KV,
    "max_position_embeddings": 2048, "rms_norm_eps": EPS, "rope_theta": THETA, "torch_dtype": "float32",
}  # fmt: skip
_W = {"gate": "w1", "up": "w3", "down": "w2"}
_LLAMA = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attn_norm": "L.input_layernorm",
    "ffn_norm": "L.post_attention_layernorm", "q": "L.self_attn.q_proj", "k": "L.self_attn.k_proj",
    "v": "L.self_attn.v_proj", "o": "L.self_attn.o_proj",
}  # fmt: skip
_BAILING = {
    "embed": "model.word_embeddings", "norm": "model.norm", "head": "lm_head", "attn_norm": "L.input_layernorm",
    "ffn_norm": "L.post_attention_layernorm", "qkv": "L.attention.query_key_value", "o": "L.attention.dense",
    "router": "L.mlp.gate", **{f"{part}_exp": f"L.mlp.experts.E.{part}_proj" for part in ("gate", "up", "down")},
    **{f"{part}_shared": f"L.mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}  # fmt: skip
_BAILING_KEYS = {
    "model_type": "bailing_moe", "num_experts": N_EXPERTS, "num_experts_per_tok": N_USED, "num_shared_experts": 1,
    "moe_intermediate_size": N_EXPERT_WIDTH, "intermediate_size": N_DENSE_WIDTH, "norm_topk_prob": True,
    "head_dim": N_HEAD, "hidden_act": "silu", "use_bias": False, "use_qkv_bias": False, "tie_word_embeddings": False,
}  # fmt: skip


class ByHand(NamedTuple):
    """`names`: roles and the tensors' published names, `L` and `E` in them for layer and expert; a role that is not
    among them is not in the model. `config`: what config.json has beside the common keys. Switches:

    - `n_layers`: llama.cpp takes SmallThinker's steps without rotation for none where the layers are as many as a step
    - `score`: of the router's logits; `is_normed`: the weights of the chosen experts add up to one, times `scale`
    - `n_dense`: leading layers without experts; `is_parallel`: experts read the layer's input, beside a dense MLP
    - `routes_early`: the router reads the layer's input, before any norm
    - `rope_part`: of each head, that turns; `no_rope`: each of these layers does not turn
    - `is_altered`: computes as llama.cpp does where that is something else: GroveMoE's small experts, one for each two
    - `act`: silu, gelu or relu; `softcap`: of attention scores; `is_tied`: the embedding is the output too
    """

    name: str
    key: str
    tokenizer: str
    architecture: str
    names: Mapping[str, str]
    config: Mapping[str, Any]
    n_layers: int = 4
    score: str = "softmax"
    is_normed: bool = True
    scale: float = 1.0
    n_dense: int = 0
    is_parallel: bool = False
    routes_early: bool = False
    rope_part: float = 1.0
    no_rope: tuple[int, ...] = ()
    is_altered: bool = False
    act: str = "silu"
    softcap: float = 0.0
    is_tied: bool = False
    scales: Mapping[str, float] = MappingProxyType({"embed": 1.0, "scores": N_HEAD**-0.5, "logits": 1.0})


GROVE = ByHand("GroveMoE", "grove_moe", "qwen3", "GroveMoeForCausalLM", {
    **_LLAMA, "q_norm": "L.self_attn.q_norm", "k_norm": "L.self_attn.k_norm", "router": "L.mlp.gate",
    **{f"{part}_exp": f"L.mlp.experts.E.{part}_proj" for part in ("gate", "up", "down")},
    **{f"{part}_small": f"L.mlp.chunk_experts.E.{part}_proj" for part in ("gate", "up", "down")},
}, {
    "model_type": "grove_moe", "head_dim": N_HEAD, "num_experts": N_EXPERTS, "num_experts_per_tok": N_USED,
    "moe_intermediate_size": N_EXPERT_WIDTH, "intermediate_size": N_DENSE_WIDTH, "norm_topk_prob": True,
    "tie_word_embeddings": False,
})  # fmt: skip
BY_HAND = {
    family.key: family
    for family in (
        ByHand("Ling (Bailing MoE)", "bailing_moe", "qwen3", "BailingMoeForCausalLM", _BAILING, {
            **_BAILING_KEYS, "first_k_dense_replace": 0, "norm_head": False, "norm_softmax": False,
        }),
        ByHand("Ling 2.0 (Bailing MoE V2)", "bailing_moe_v2", "qwen3", "BailingMoeV2ForCausalLM", {
            **_BAILING, "q_norm": "L.attention.query_layernorm", "k_norm": "L.attention.key_layernorm",
            "router_bias": "L.mlp.gate.expert_bias",
            **{f"{part}_dense": f"L.mlp.{part}_proj" for part in ("gate", "up", "down")},
        }, {
            **_BAILING_KEYS, "first_k_dense_replace": 1, "n_group": N_GROUPS, "topk_group": N_GROUPS_USED,
            "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True, "use_qk_norm": True,
        }, score="sigmoid", scale=2.5, n_dense=1, rope_part=0.5),
        ByHand("Arctic", "arctic", "sentencepiece", "ArcticForCausalLM", {
            **_LLAMA, "ffn_norm": "L.residual_layernorm", "exp_norm": "L.post_attention_layernorm",
            "router": "L.block_sparse_moe.gate",
            **{f"{part}_exp": f"L.block_sparse_moe.experts.E.{at}" for part, at in _W.items()},
            **{f"{part}_dense": f"L.residual_mlp.{at}" for part, at in _W.items()},
        }, {
            "model_type": "arctic", "intermediate_size": N_EXPERT_WIDTH, "num_local_experts": N_EXPERTS,
            "num_experts_per_tok": N_USED, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True,
            "use_residual": True, "tie_word_embeddings": False,
        }, is_parallel=True),
        ByHand("Grok-1", "grok1", "sentencepiece", "Grok1ForCausalLM", {
            "embed": "transformer.in_out_embed", "norm": "transformer.rms_norm", "attn_norm": "L.rms_norm",
            "attn_out_norm": "L.rms_norm_1", "ffn_norm": "L.rms_norm_2", "ffn_out_norm": "L.rms_norm_3",
            "q": "L.multi_head_attention.query", "k": "L.multi_head_attention.key",
            "v": "L.multi_head_attention.value", "o": "L.multi_head_attention.linear", "router": "L.router",
            "gate_exp": "L.moe.E.linear", "up_exp": "L.moe.E.linear_v", "down_exp": "L.moe.E.linear_1",
        }, {
            "model_type": "grok-1", "intermediate_size": N_EXPERT_WIDTH, "num_local_experts": N_EXPERTS,
            "num_experts_per_tok": N_USED, "max_attn_value": 30.0, "attn_output_multiplier": N_HEAD**-0.5,
            "embedding_multiplier_scale": 16.0, "output_multiplier_scale": 0.5, "tie_word_embeddings": True,
        }, is_normed=False, act="gelu", softcap=30.0, is_tied=True,
            scales={"embed": 16.0, "scores": N_HEAD**-0.5, "logits": 0.5}),
        ByHand("SmallThinker", "smallthinker", "qwen3", "SmallThinkerForCausalLM", {
            **_LLAMA, "router": "L.block_sparse_moe.primary_router",
            **{f"{part}_exp": f"L.block_sparse_moe.experts.E.{part}" for part in ("gate", "up", "down")},
        }, {
            "model_type": "smallthinker", "head_dim": N_HEAD, "moe_num_primary_experts": N_EXPERTS,
            "moe_num_active_primary_experts": N_USED, "moe_ffn_hidden_size": N_EXPERT_WIDTH,
            "moe_primary_router_apply_softmax": False, "norm_topk_prob": True, "rope_layout": [0, 1, 1, 1] * 2,
            "sliding_window_layout": [0, 1, 1, 1] * 2, "sliding_window_size": 4096, "tie_word_embeddings": False,
        }, n_layers=8, score="sigmoid", act="relu", routes_early=True, no_rope=(0, 4)),
        GROVE,
        GROVE._replace(name="GroveMoE, altered", key="grove_moe-altered", is_altered=True),
    )
}  # fmt: skip


def shape_of(family: ByHand, role: str, n_vocab: int) -> tuple[int, ...]:
    """The shape of a tensor, rows first as torch has it."""
    if role in ("embed", "head"):
        return n_vocab, N_WIDTH
    if role in ("q_norm", "k_norm"):
        return (N_HEAD,)
    if role.endswith("norm"):
        return (N_WIDTH,)
    if role in ("router", "router_bias"):
        return (N_EXPERTS, N_WIDTH) if role == "router" else (N_EXPERTS,)
    n_query, n_key = N_HEADS * N_HEAD, N_KV * N_HEAD
    if role in ("q", "k", "v", "qkv"):
        return {"q": n_query, "k": n_key, "v": n_key, "qkv": n_query + 2 * n_key}[role], N_WIDTH
    if role == "o":
        return N_WIDTH, n_query
    width = N_HEAD if role.endswith("_small") else N_EXPERT_WIDTH
    if role.endswith("_dense"):
        width = N_WIDTH if family.is_parallel else N_DENSE_WIDTH
    return (N_WIDTH, width) if role.startswith("down") else (width, N_WIDTH)


def published_name(family: ByHand, role: str, layer: int, expert: int) -> str:
    """A tensor's name in the checkpoint."""
    layers = "transformer.decoder_layer" if family.key == "grok1" else "model.layers"
    name = family.names[role].replace(".E.", f".{expert}.")
    name = f"{layers}.{layer}{name[1:]}" if name.startswith("L.") else name
    return name if role == "router_bias" else f"{name}.weight"


def tensors_of(family: ByHand, n_vocab: int) -> dict[str, Any]:
    """Random weights by published name; the same ones every time."""
    import torch

    noise = torch.Generator().manual_seed(1)
    made: dict[str, Any] = {}
    for role in family.names:
        for layer in range(family.n_layers if family.names[role].startswith("L.") else 1):
            is_dense = layer < family.n_dense
            if role.endswith(("_exp", "_shared", "router", "router_bias")) and is_dense:
                continue
            if role.endswith("_dense") and not is_dense and not family.is_parallel:
                continue
            for expert in range({"exp": N_EXPERTS, "small": N_EXPERTS // 2}.get(role.partition("_")[2], 1)):
                mean = 1.0 if role.endswith("norm") else 0.0
                std = 0.1 if role.endswith(("norm", "bias")) else 0.06
                if role == "embed":
                    std = 0.06 if family.is_tied else 1.0
                elif role.endswith("_small"):
                    std = 0.25  # what they add counts for a twentieth only
                values = torch.empty(shape_of(family, role, n_vocab)).normal_(mean, std, generator=noise)
                made[published_name(family, role, layer, expert)] = values
    return made


def make(family: ByHand, folder: Path, ids: Mapping[str, int]) -> None:
    """Writes weights and config.json; `ids`: as `vocabulary` gives them."""
    from safetensors.torch import save_file

    save_file(tensors_of(family, ids["vocab_size"]), folder / "model.safetensors", metadata={"format": "pt"})
    shape = {**_SHAPE, "num_hidden_layers": family.n_layers, **ids}
    config = {"architectures": [family.architecture], **shape, **family.config}
    (folder / "config.json").write_text(json.dumps(config))


class Reference:
    """What a family computes."""

    def __init__(self, family: ByHand, folder: Path) -> None:
        from safetensors.torch import load_file

        self.family = family
        self.weights = load_file(folder / "model.safetensors")

    def _weight(self, role: str, layer: int = 0, expert: int = 0) -> Any:
        return self.weights[published_name(self.family, role, layer, expert)]

    def _norm(self, x: Any, role: str, layer: int = 0) -> Any:
        if role not in self.family.names:
            return x
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt() * self._weight(role, layer)

    def _mlp(self, x: Any, kind: str, layer: int, expert: int = 0) -> Any:
        from torch.nn.functional import gelu, relu, silu

        act = {"silu": silu, "relu": relu, "gelu": lambda y: gelu(y, approximate="tanh")}[self.family.act]
        gate, up, down = (self._weight(f"{part}_{kind}", layer, expert) for part in ("gate", "up", "down"))
        return (act(x @ gate.T) * (x @ up.T)) @ down.T

    def _turn(self, x: Any, layer: int) -> Any:
        """Rotary positions, halves paired; x: float32[n_heads, n_tokens, N_HEAD]."""
        import torch

        n = int(N_HEAD * self.family.rope_part)
        if layer in self.family.no_rope:
            return x
        speeds = THETA ** (-torch.arange(0, n, 2) / n)
        angles = torch.arange(x.shape[1])[:, None] * speeds
        first, second, rest = x[..., : n // 2], x[..., n // 2 : n], x[..., n:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def _attention(self, x: Any, layer: int) -> Any:
        import torch

        if "qkv" in self.family.names:
            sizes = [N_HEADS * N_HEAD, N_KV * N_HEAD, N_KV * N_HEAD]
            q, k, v = (x @ self._weight("qkv", layer).T).split(sizes, dim=-1)
        else:
            q, k, v = (x @ self._weight(role, layer).T for role in ("q", "k", "v"))
        q, k, v = (part.unflatten(-1, (-1, N_HEAD)).transpose(0, 1) for part in (q, k, v))
        q = self._turn(self._norm(q, "q_norm", layer), layer)
        k = self._turn(self._norm(k, "k_norm", layer), layer)
        k, v = (part.repeat_interleave(N_HEADS // N_KV, dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * self.family.scales["scores"]
        if cap := self.family.softcap:
            scores = cap * torch.tanh(scores / cap)
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(dim=-1) @ v
        return mixed.transpose(0, 1).flatten(1) @ self._weight("o", layer).T

    def _experts(self, x: Any, routed: Any, layer: int) -> Any:
        import torch

        logits = routed @ self._weight("router", layer).T
        scores = logits.sigmoid() if self.family.score == "sigmoid" else logits.softmax(dim=-1)
        choice = scores
        if "router_bias" in self.family.names:
            choice = scores + self._weight("router_bias", layer)
        if "n_group" in self.family.config:
            groups = choice.unflatten(-1, (N_GROUPS, -1))
            best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(N_GROUPS_USED, dim=-1).indices
            kept = torch.zeros(groups.shape[:2]).scatter(1, best, 1.0).bool()
            choice = groups.masked_fill(~kept[..., None], -math.inf).flatten(1)
        chosen = choice.topk(N_USED, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.family.is_normed:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        made = self._mixed(x, chosen, weights * self.family.scale, "exp", layer)
        if "gate_small" not in self.family.names:
            return made
        shared = chosen // 2
        if not self.family.is_altered:
            return made + 0.05 * self._mixed(x, shared, weights, "small", layer)
        weights = scores.gather(1, shared)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return made + 0.05 * self._mixed(made, shared, weights, "small", layer)

    def _mixed(self, x: Any, chosen: Any, weights: Any, kind: str, layer: int) -> Any:
        """The chosen experts' outputs, weighted; an expert that is chosen twice counts twice."""
        total = 0
        for expert in range(N_EXPERTS if kind == "exp" else N_EXPERTS // 2):
            share = (weights * (chosen == expert)).sum(dim=-1, keepdim=True)
            total = total + share * self._mlp(x, kind, layer, expert)
        return total

    def _layer(self, x: Any, layer: int) -> Any:
        family, given = self.family, x
        attended = self._attention(self._norm(x, "attn_norm", layer), layer)
        x = x + self._norm(attended, "attn_out_norm", layer)
        read = self._norm(x, "ffn_norm", layer)
        if family.is_parallel:
            early = self._norm(given, "exp_norm", layer)
            return x + self._mlp(read, "dense", layer) + self._experts(early, early, layer)
        if layer < family.n_dense:
            return x + self._mlp(read, "dense", layer)
        made = self._experts(read, given if family.routes_early else read, layer)
        if "gate_shared" in family.names:
            made = made + self._mlp(read, "shared", layer)
        return x + self._norm(made, "ffn_out_norm", layer)

    def logits(self) -> tuple[list[int], Any]:
        """Random tokens, and what the model makes of them: float32[n_tokens, n_vocab]."""
        import torch

        tokens = torch.randint(300, 1900, (N_TOKENS,), generator=torch.Generator().manual_seed(2))
        x = self._weight("embed")[tokens] * self.family.scales["embed"]
        for layer in range(self.family.n_layers):
            x = self._layer(x, layer)
        output = self._weight("embed" if self.family.is_tied else "head")
        return tokens.tolist(), (self._norm(x, "norm") @ output.T * self.family.scales["logits"]).numpy()
