"""What a model is made of: a GGUF header in, `ModelFacts` out: bytes per layer and role, KV arithmetic. Pure.

    facts = read_facts(read_header(path))
    facts.total_bytes, facts.active_params          # all weights; what one token uses of them
    kv_bytes(facts, n_ctx=16384, kv_type="q8_0")    # what llama.cpp will allocate for one sequence of that length

Every tensor has exactly one role, decided by its name (`roles.py`); what a layer remembers comes from the metadata
(`memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.graph import GraphFacts, read_graph
from moelocal.model.header import GGUFHeader, TensorInfo
from moelocal.model.keys import MAX_LAYERS, Keys, read_keys
from moelocal.model.kv import KVCache, KVType, fits_heads
from moelocal.model.memory import LayerMemory, Memory, read_memory
from moelocal.model.quants import quant_label
from moelocal.model.roles import Role, is_split_expert, tensor_role

DEFAULT_N_UBATCH = 512  # llama.cpp's
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS, llama.cpp 0c1e57098 src/llama-hparams.h
_MAX_N_CTX = 1 << 28
_F16_BYTES = 2
TypeBytes = tuple[tuple[str, int], ...]  # bytes of weights by ggml type, as (name, bytes)
# A quantized cache needs it. Source: llama.cpp 0c1e57098, src/llama-context.cpp, llama_init_from_model.
NO_FLASH_ATTENTION = {"grok"}


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer: bytes of weights by role, and what it remembers.

    `attention_bytes` includes linear attention (SSM, delta net, short convolutions); `other_bytes` are norms and
    whatever else every token reads; `dense_types` are all always-active bytes by type. `expert_tensors` are those of
    the routed experts, the units of placement; `active_expert_bytes` is what one token reads of them. `n_experts` is 0
    in a dense layer. `state_bytes` is the recurrent state of one sequence (float32).
    """

    index: int
    attention_bytes: int
    dense_ffn_bytes: int
    shared_expert_bytes: int
    routed_expert_bytes: int
    router_bytes: int = 0
    other_bytes: int = 0
    active_expert_bytes: int = 0
    n_experts: int = 0
    n_experts_used: int = 0
    expert_tensors: tuple[TensorInfo, ...] = ()
    caches: tuple[KVCache, ...] = ()
    state_bytes: int = 0
    dense_types: TypeBytes = ()

    @property
    def always_active_bytes(self) -> int:
        """Bytes that every token reads, whatever the router says."""
        return (
            self.attention_bytes
            + self.dense_ffn_bytes
            + self.shared_expert_bytes
            + self.router_bytes
            + self.other_bytes
        )

    @property
    def total_bytes(self) -> int:
        """All weights of the layer."""
        return self.always_active_bytes + self.routed_expert_bytes

    @property
    def kind(self) -> tuple[object, ...]:
        """The same for layers that take and cost the same wherever they are put."""
        tensors = tuple((t.name.split(".", 2)[-1], t.shape, t.ggml_type, t.n_bytes) for t in self.expert_tensors)
        used = self.n_experts, self.n_experts_used, self.active_expert_bytes
        return self.always_active_bytes, self.dense_types, tensors, used, self.caches, self.state_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes of one more position in f16, until a window is full; its share of a cell that holds several."""
        return sum((cache.k_elements + cache.v_elements) * _F16_BYTES // cache.ratio for cache in self.caches)

    @property
    def kv_window(self) -> int | None:
        """Positions that a sliding-window layer keeps; None: all of them, or the layer has no cache."""
        return self.caches[0].window if self.caches else None

    def kv_bytes(self, n_ctx: int, kv_type: KVType = "f16", n_ubatch: int = DEFAULT_N_UBATCH) -> int:
        """Bytes that the layer's caches and state take for one sequence of n_ctx tokens (`kv_bytes` for details)."""
        return self.state_bytes + sum(cache.n_bytes(n_ctx, kv_type, n_ubatch) for cache in self.caches)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as llama.cpp loads it. Bytes are bytes of weights as stored.

    - `embedding_bytes`: tables of which a token reads one row each (`embedding_row_bytes`); they stay in RAM.
    - `output_bytes`: what goes to the output device. A model without an output matrix uses the embedding a second time:
      `tied_output_bytes` of it are then that copy, which is in the file only once.
    - `other_bytes`: the few tensors that belong to no layer.
    - `mtp_bytes`: layers that predict several tokens ahead (MTP, NextN); in the file, but not loaded.
    - `total_params`: the weights that are loaded. `active_params`: those that one token uses: every always-active
      weight, of the routed experts the chosen share, of an embedding table one row. Model cards often count the whole
      table: theirs are then larger by `n_vocab` times the embedding's length, unless it serves as the output too.
    - `graph`: widths of the activations, for `compute.compute_bytes`.
    - `output_types`: `output_bytes` and `other_bytes` by type. `head_lengths`: lengths of a head's keys and values.
      `extra_caches`: caches of layers without loaded weights. `hit_rates`: see `usage.hit_rates`; empty: not known.
    """

    arch: str
    name: str
    layers: tuple[LayerFacts, ...]
    n_experts: int
    n_experts_used: int
    n_ctx_train: int
    n_vocab: int
    embedding_bytes: int
    output_bytes: int
    tied_output_bytes: int = 0
    embedding_row_bytes: int = 0
    other_bytes: int = 0
    mtp_bytes: int = 0
    total_params: int = 0
    active_params: int = 0
    file_bytes: int = 0
    quant: str = "unknown"
    head_lengths: tuple[int, ...] = ()
    output_types: TypeBytes = ()
    extra_caches: tuple[KVCache, ...] = field(default=())
    graph: GraphFacts = field(default=GraphFacts())
    hit_rates: tuple[float, ...] = ()

    def attention_macs(self, index: int, least_per_head: int = 0) -> int:
        """Multiplications of one query token with one position of a layer's cache, keys and values; 0 where there is
        no attention, or the graph is not known. `least_per_head`: what a short head counts as."""
        graph = self.graph.layers[index].attention if index < len(self.graph.layers) else None
        if graph is None:
            return 0
        if graph.latent is not None:
            _, rope, rank = graph.latent
            return graph.n_head * max(least_per_head, 2 * rank + rope)
        return max(2 * graph.out, graph.n_head * least_per_head)

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return self.n_experts > 0

    @property
    def kinds(self) -> tuple[int, ...]:
        """For each layer the number of the first one of its kind: a model of 94 layers has three or four. The last
        layer is a kind of its own: of a prompt, most of it computes the last token only."""
        first: dict[tuple[object, ...], int] = {}
        graphs = [graph.attention for graph in self.graph.layers] or [None] * len(self.layers)
        pairs = zip(self.layers[:-1], graphs[:-1], strict=True)
        kinds = [first.setdefault((layer.kind, graph), index) for index, (layer, graph) in enumerate(pairs)]
        return (*kinds, len(kinds)) if self.layers else ()

    @property
    def routed_bytes(self) -> int:
        """Routed experts of all layers."""
        return sum(layer.routed_expert_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """All weights that are loaded, a tied output counted once."""
        outside = self.embedding_bytes + self.output_bytes - self.tied_output_bytes + self.other_bytes
        return outside + sum(layer.total_bytes for layer in self.layers)

    @property
    def always_active_bytes(self) -> int:
        """Bytes that every token reads, whatever the routers say; of embedding tables one row."""
        outside = self.embedding_row_bytes + self.output_bytes + self.other_bytes
        return outside + sum(layer.always_active_bytes for layer in self.layers)

    @property
    def active_bytes_per_token(self) -> int:
        """Bytes of weights that one token reads: the always-active ones and the chosen experts."""
        return self.always_active_bytes + sum(layer.active_expert_bytes for layer in self.layers)

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes of one more position in f16, until windows are full."""
        return sum(layer.kv_bytes_per_token for layer in self.layers)

    def fits_kv_type(self, kv_type: KVType) -> bool:
        """Whether llama.cpp can keep this model's KV cache in that type."""
        return kv_type == "f16" or (self.arch not in NO_FLASH_ATTENTION and fits_heads(self.head_lengths, kv_type))


def kv_bytes(facts: ModelFacts, n_ctx: int, kv_type: KVType = "f16", n_ubatch: int = DEFAULT_N_UBATCH) -> int:
    """Bytes that llama.cpp allocates for one sequence of n_ctx tokens: KV caches, indexer caches, recurrent state.

    For `n_seq_max=1`, `swa_full=False`, the same type for keys and values, flash attention not disabled (without it,
    models whose layers differ in their values' size take more).

    Raises:
        BadRequest: this model's cache cannot have that type.
    """
    extra = sum(cache.n_bytes(n_ctx, kv_type, n_ubatch) for cache in facts.extra_caches)
    return extra + sum(layer.kv_bytes(n_ctx, kv_type, n_ubatch) for layer in facts.layers)


def read_facts(header: GGUFHeader) -> ModelFacts:
    """The facts of the model that a header describes.

    Raises:
        BadGGUF: the header contradicts itself, lacks what llama.cpp needs, or is no language model's.
    """
    keys = read_keys(header)
    n_layers, n_trunk = _layer_counts(keys, header.tensors)
    tensors = _Tensors.sort(keys, header.tensors, n_layers)
    used = _experts_used(keys, tensors.experts(n_trunk), n_layers)
    n_ctx_train = keys.integer("context_length")
    if n_ctx_train > _MAX_N_CTX:
        raise keys.bad(f"The header claims a context of {n_ctx_train:,} tokens")
    memory = read_memory(keys, n_layers, n_trunk)
    layers = tuple(_layer_facts(i, tensors.layers[i], used[i], memory.layers[i]) for i in range(n_trunk))
    return _model_facts(header, keys, tensors, layers, memory, n_ctx_train)


class _Tensors(NamedTuple):
    """A header's tensors, each in exactly one place: by role outside the layers, by layer and role inside."""

    outside: dict[Role, list[TensorInfo]]
    layers: list[dict[Role, list[TensorInfo]]]

    @classmethod
    def sort(cls, keys: Keys, tensors: Iterable[TensorInfo], n_layers: int) -> _Tensors:
        sorted_tensors = cls({}, [{} for _ in range(n_layers)])
        for tensor in tensors:
            layer, role = tensor_role(tensor.name)
            if layer is None:
                sorted_tensors.outside.setdefault(role, []).append(tensor)
                continue
            if layer >= n_layers:
                raise keys.bad(f"{tensor.name} is in the file, but the header says {n_layers} layers")
            if is_split_expert(tensor.name):
                raise keys.bad(
                    f"{tensor.name} holds one expert alone, a layout of 2023 that llama.cpp no longer loads",
                    "Get a newer conversion of the model.",
                )
            sorted_tensors.layers[layer].setdefault(role, []).append(tensor)
        return sorted_tensors

    def experts(self, n_trunk: int) -> list[TensorInfo]:
        return [tensor for layer in self.layers[:n_trunk] for tensor in layer.get("routed_expert", [])]


def _layer_counts(keys: Keys, tensors: Iterable[TensorInfo]) -> tuple[int, int]:
    """Layers in all, and those of them that answer. The rest predict ahead and are not loaded."""
    n_layers = keys.integer("block_count")
    if not 0 < n_layers <= MAX_LAYERS:
        raise keys.bad(f"The header claims {n_layers:,} layers; llama.cpp takes 1 to {MAX_LAYERS}")
    n_mtp = keys.integer("nextn_predict_layers", 0)
    if n_mtp > n_layers:
        raise keys.bad(f"The header claims {n_mtp:,} prediction layers among {n_layers}")
    if n_mtp == n_layers:  # a draft model: these layers are all it has
        return n_layers, n_layers
    if keys.arch == "deepseek4":  # its block count leaves them out when the file does
        probe = f"blk.{n_layers - n_mtp}.nextn.eh_proj.weight"
        n_mtp = n_mtp if any(tensor.name == probe for tensor in tensors) else 0
    return n_layers, n_layers - n_mtp


def _experts_used(keys: Keys, experts: list[TensorInfo], n_layers: int) -> tuple[int, ...]:
    """Experts per token, for each layer; all 0 for a dense model."""
    n_experts = keys.integer("expert_count", 0)
    used = keys.per_layer("expert_used_count", n_layers, 0)
    if not experts:
        if n_experts > 1:
            raise keys.bad(f"The header claims {n_experts} experts, but no tensor holds them (ffn_*_exps)")
        return (0,) * n_layers
    if not 0 < n_experts <= _MAX_EXPERTS:
        raise keys.bad(f"The file has expert tensors, but the header claims {n_experts:,} experts")
    if not 0 < max(used) <= n_experts:
        raise keys.bad(f"The header claims {max(used)} experts per token of {n_experts}")
    for tensor in experts:
        n_held = tensor.shape[-1] if tensor.shape else 0
        is_chunk = "_chexps" in tensor.name  # one per group of experts
        if n_held != n_experts and not (is_chunk and 0 < n_held <= n_experts):
            raise keys.bad(f"{tensor.name} holds {n_held} experts, the header claims {n_experts}")
    return used


def _layer_facts(index: int, roles: dict[Role, list[TensorInfo]], n_used: int, memory: LayerMemory) -> LayerFacts:
    def total(*names: Role) -> int:
        return sum(_bytes(roles.get(name, [])) for name in names)

    experts = tuple(roles.get("routed_expert", []))
    return LayerFacts(
        index=index,
        attention_bytes=total("attention"),
        dense_ffn_bytes=total("dense_ffn"),
        shared_expert_bytes=total("shared_expert"),
        routed_expert_bytes=total("routed_expert"),
        router_bytes=total("router"),
        other_bytes=total("norm", "other"),
        active_expert_bytes=sum(_chosen(tensor, tensor.n_bytes, n_used) for tensor in experts),
        n_experts=max((tensor.shape[-1] for tensor in experts), default=0),
        n_experts_used=n_used if experts else 0,
        expert_tensors=experts,
        caches=memory.caches,
        state_bytes=memory.state_bytes,
        dense_types=_by_type(tensor for role, held in roles.items() if role != "routed_expert" for tensor in held),
    )


def _chosen(tensor: TensorInfo, amount: int, n_used: int) -> int:
    """The share of an expert tensor's bytes or elements that one token uses."""
    return amount * min(n_used, tensor.shape[-1]) // tensor.shape[-1]


def _one_row(table: TensorInfo, amount: int) -> int:
    """One row's share of an embedding table's bytes or elements."""
    return amount // max(1, table.shape[-1] if table.shape else 1)


def _count_params(tensors: _Tensors, layers: tuple[LayerFacts, ...], tied: TensorInfo | None) -> tuple[int, int]:
    """Weights that are loaded, and those that one token uses (see ModelFacts)."""
    total, active = 0, math.prod(tied.shape) if tied else 0
    for role, outside in tensors.outside.items():
        for tensor in outside:
            n_params = math.prod(tensor.shape)
            total += n_params
            active += _one_row(tensor, n_params) if role == "embedding" else n_params
    for layer in layers:
        for role, inside in tensors.layers[layer.index].items():
            for tensor in inside:
                n_params = math.prod(tensor.shape)
                total += n_params
                active += _chosen(tensor, n_params, layer.n_experts_used) if role == "routed_expert" else n_params
    return total, active


def _by_type(tensors: Iterable[TensorInfo]) -> TypeBytes:
    held: dict[str, int] = {}
    for tensor in tensors:
        name = GGML_TYPES[tensor.ggml_type].name
        held[name] = held.get(name, 0) + tensor.n_bytes
    return tuple(sorted(held.items()))


def _bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.n_bytes for tensor in tensors)


def _model_facts(
    header: GGUFHeader, keys: Keys, tensors: _Tensors, layers: tuple[LayerFacts, ...], memory: Memory, n_ctx_train: int
) -> ModelFacts:
    tables = tensors.outside.get("embedding", [])
    outputs = tensors.outside.get("output", [])
    others = tensors.outside.get("norm", []) + tensors.outside.get("other", [])
    tokens = next((table for table in tables if table.name == "token_embd.weight"), None)
    if tokens is None or len(tokens.shape) != 2 or not tokens.shape[1]:
        raise keys.bad("The file has no token embedding (token_embd.weight), so it is not a language model", "")
    is_encoder = header.metadata.get(f"{keys.arch}.attention.causal") is False
    is_tied = not is_encoder and all(tensor.name != "output.weight" for tensor in outputs)
    total, active = _count_params(tensors, layers, tied=tokens if is_tied else None)
    name = header.metadata.get("general.name")
    return ModelFacts(
        arch=keys.arch,
        name=name if isinstance(name, str) and name else keys.arch,
        layers=layers,
        n_experts=max(layer.n_experts for layer in layers),
        n_experts_used=max(layer.n_experts_used for layer in layers),
        n_ctx_train=n_ctx_train,
        n_vocab=tokens.shape[1],
        embedding_bytes=_bytes(tables),
        output_bytes=_bytes(outputs) + (tokens.n_bytes if is_tied else 0),
        tied_output_bytes=tokens.n_bytes if is_tied else 0,
        embedding_row_bytes=sum(_one_row(table, table.n_bytes) for table in tables),
        other_bytes=_bytes(others),
        mtp_bytes=sum(_bytes(role) for layer in tensors.layers[len(layers) :] for role in layer.values()),
        total_params=total,
        active_params=active,
        file_bytes=header.file_bytes,
        quant=quant_label(header),
        head_lengths=memory.head_lengths,
        output_types=_by_type([*outputs, *others, *([tokens] if is_tied else [])]),
        extra_caches=memory.extra,
        graph=read_graph(header, tuple(layer.n_experts_used for layer in layers)),
    )
