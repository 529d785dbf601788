"""What each layer of a model remembers: the shape of its KV caches, the bytes of its recurrent state.

Two things are fixed in llama.cpp's code and said in no header: which layers of an architecture slide their window, and
which are recurrent. They are the tables here, the only ones that go by an architecture's name.

Source: llama.cpp 0c1e57098: src/llama-model.cpp (load_hparams, create_memory), src/llama-hparams.cpp (n_embd_k_gqa,
n_embd_r, n_embd_s), `load_arch_hparams` of src/models/*.cpp, src/llama-kv-cache*.cpp, src/llama-memory-*.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moelocal.model.keys import Keys
from moelocal.model.kv import KVCache

_F32 = 4  # bytes; recurrent state is never quantized
_CSA_RATIO, _HCA_RATIO = 4, 128  # DeepSeek-V4's two kinds of compressed attention


class LayerMemory(NamedTuple):
    """What one layer remembers: its caches, which grow with the context, and its recurrent state, which does not."""

    caches: tuple[KVCache, ...] = ()
    state_bytes: int = 0


class Memory(NamedTuple):
    """`layers`: those that answer. `extra`: caches of layers without loaded weights. `head_lengths`: the lengths of a
    head's keys and values, which decide whether a cache can be quantized (`kv.fits_heads`)."""

    layers: tuple[LayerMemory, ...]
    extra: tuple[KVCache, ...]
    head_lengths: tuple[int, ...]


class _Sliding(NamedTuple):
    """Every `period`-th layer sees everything (the last of each group, or the first), the others slide.

    `period` 0: all layers slide; 1: none does, unless the header has an array that says which.
    `default`, `fixed`: the window when the header has none, and the window whatever the header says.
    """

    period: int
    dense_first: bool = False
    default: int = 0
    fixed: int = 0


_SLIDING = {
    "afmoe": _Sliding(4),
    "cohere2": _Sliding(4),
    "cohere2moe": _Sliding(4, dense_first=True),
    "deepseek4": _Sliding(0),
    "dflash": _Sliding(1),
    "dots3note": _Sliding(1),
    "exaone-moe": _Sliding(4),
    "exaone4": _Sliding(4, default=4096),
    "gemma-embedding": _Sliding(6),
    "gemma2": _Sliding(2, default=4096),
    "gemma3": _Sliding(6),
    "gemma3n": _Sliding(5),
    "gemma4": _Sliding(1),
    "gemma4-assistant": _Sliding(1),
    "gpt-oss": _Sliding(2),
    "granite_swa": _Sliding(1),
    "laguna": _Sliding(4, dense_first=True),
    "lfm2": _Sliding(0),
    "llama4": _Sliding(4, default=8192, fixed=8192),
    "maple": _Sliding(1),
    "mellum": _Sliding(4),
    "mimo2": _Sliding(1),
    "modern-bert": _Sliding(3, dense_first=True),
    "muse-glimmer": _Sliding(4),
    "olmo2": _Sliding(4),
    "plamo3": _Sliding(8),
    "smallthinker": _Sliding(4, dense_first=True, fixed=4096),
    "spark2_5": _Sliding(1),
    "step35": _Sliding(1),
}

StateKind = Literal["ssm", "wkv", "kda", "shortconv", "lightning"]
RecurrentLayers = Literal["all", "both", "no_kv", "no_kv_no_ffn", "interval"]


class _Recurrence(NamedTuple):
    """What state a recurrent layer keeps, and which layers are recurrent.

    `layers`: all; both (recurrent and attending at once); no_kv (those without KV heads); no_kv_no_ffn; interval (all
    but every `interval`-th, unless `attention.recurrent_layers` says which).
    """

    state: StateKind
    layers: RecurrentLayers
    interval: int = 4


_RECURRENT = {
    "arwkv7": _Recurrence("wkv", "all"),
    "bailingmoe3": _Recurrence("kda", "no_kv"),
    "falcon-h1": _Recurrence("ssm", "both"),
    "glm5-next": _Recurrence("kda", "no_kv"),
    "granitehybrid": _Recurrence("ssm", "no_kv"),
    "jamba": _Recurrence("ssm", "no_kv"),
    "kimi-k3": _Recurrence("kda", "no_kv"),
    "kimi-linear": _Recurrence("kda", "no_kv"),
    "lfm2": _Recurrence("shortconv", "no_kv"),
    "lfm2moe": _Recurrence("shortconv", "no_kv"),
    "mamba": _Recurrence("ssm", "all"),
    "mamba2": _Recurrence("ssm", "all"),
    "minimax-01": _Recurrence("lightning", "interval", 8),
    "nemotron_h": _Recurrence("ssm", "no_kv_no_ffn"),
    "nemotron_h_moe": _Recurrence("ssm", "no_kv_no_ffn"),
    "plamo2": _Recurrence("ssm", "no_kv"),
    "qwen35": _Recurrence("ssm", "interval"),
    "qwen35moe": _Recurrence("ssm", "interval"),
    "qwen3next": _Recurrence("ssm", "interval"),
    "qwen4exp": _Recurrence("ssm", "interval"),
    "rwkv6": _Recurrence("wkv", "all"),
    "rwkv6qwen2": _Recurrence("wkv", "all"),
    "rwkv7": _Recurrence("wkv", "all"),
}

# Encoders and diffusion models see the whole text at once and cache nothing.
_NO_CACHE = {
    "bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe", "modern-bert",
    "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1", "wavtokenizer-dec",
}  # fmt: skip

# Layers that predict ahead (MTP) get a cache even when they are not loaded: create_memory has no filter against them.
_MTP_CACHED = {"bailingmoe3", "deepseek4", "nemotron_h", "nemotron_h_moe"}


@dataclass(frozen=True, slots=True)
class _Layer:
    """The header's attention numbers for one layer. `is_trunk`: it answers; otherwise it predicts ahead (MTP)."""

    index: int
    is_trunk: bool
    n_head: int  # query heads of the first layer: what llama.cpp sizes recurrent states by
    n_head_kv: int
    k_length: int
    v_length: int
    is_mla: bool  # keys only: values are recomputed from them
    window: int | None
    is_recurrent: bool
    has_cache: bool


def read_memory(keys: Keys, n_layers: int, n_trunk: int) -> Memory:
    """What each of n_layers layers remembers; the first n_trunk of them answer, the rest predict ahead (MTP).

    Raises:
        BadGGUF: numbers that are missing or cannot be.
    """
    layers = _read_layers(keys, n_layers, n_trunk)
    memories = [LayerMemory(tuple(_caches(keys, layer)), _state_bytes(keys, layer)) for layer in layers]
    extra = tuple(cache for memory in memories[n_trunk:] for cache in memory.caches)
    if keys.arch == "graniteswitch":  # a router of one head, behind the last layer
        extra += (KVCache(layers[0].k_length, layers[0].v_length),)
    if keys.arch == "nanbeige":  # the same weights run several times, each time with caches of their own
        once = tuple(cache for memory in memories for cache in memory.caches)
        extra += once * (min(keys.integer("num_loops", 1), 512) - 1)
    lengths = {length for layer in layers[:n_trunk] for length in (layer.k_length, layer.v_length)}
    return Memory(tuple(memories[:n_trunk]), extra, tuple(sorted(lengths)))


def _read_layers(keys: Keys, n_layers: int, n_trunk: int) -> list[_Layer]:
    rule = _RECURRENT.get(keys.arch)
    n_heads = keys.per_layer("attention.head_count", n_layers, 0 if rule and rule.layers == "all" else None)
    heads_kv = keys.per_layer("attention.head_count_kv", n_layers) if keys.has("attention.head_count_kv") else n_heads
    n_head = n_heads[0]
    k_length = v_length = 0
    if n_head or keys.arch == "plamo2":
        length = keys.integer("embedding_length") // n_head if n_head else 0
        k_length = keys.integer("attention.key_length", length)
        v_length = keys.integer("attention.value_length", length)
    k_sliding = keys.integer("attention.key_length_swa", k_length)
    v_sliding = keys.integer("attention.value_length_swa", v_length)
    is_mla = keys.integer("attention.key_length_mla", 0) > 0 and keys.integer("attention.value_length_mla", 0) > 0
    is_recurrent = _recurrent_layers(keys, rule, heads_kv, n_trunk)
    has_cache = _cached_layers(keys, rule, is_recurrent, n_trunk)
    return [
        _Layer(
            index=index,
            is_trunk=index < n_trunk,
            n_head=n_head,
            n_head_kv=heads_kv[index],
            k_length=k_length if window is None else k_sliding,
            v_length=v_length if window is None else v_sliding,
            is_mla=is_mla,
            window=window,
            is_recurrent=is_recurrent[index],
            has_cache=has_cache[index],
        )
        for index, window in enumerate(_windows(keys, n_layers, n_trunk))
    ]


def _windows(keys: Keys, n_layers: int, n_trunk: int) -> list[int | None]:
    """Window of each layer, None where it sees everything."""
    rule = _SLIDING.get(keys.arch)
    if rule is None or (keys.arch == "exaone4" and n_trunk != 64):
        return [None] * n_layers
    window = keys.integer("attention.sliding_window", rule.default)
    if window == 0:
        return [None] * n_layers
    window = rule.fixed or window
    slides = keys.array("attention.sliding_window_pattern")
    if slides is not None:
        return [window if index < len(slides) and slides[index] else None for index in range(n_layers)]
    period = rule.period if rule.period < 2 else keys.integer("attention.sliding_window_pattern", rule.period)

    def is_dense(index: int) -> bool:
        return period > 0 and index % period == (0 if rule.dense_first else period - 1)

    beyond = window if keys.arch == "deepseek4" else None
    return [(None if is_dense(index) else window) if index < n_trunk else beyond for index in range(n_layers)]


def _recurrent_layers(keys: Keys, rule: _Recurrence | None, heads_kv: tuple[int, ...], n_trunk: int) -> list[bool]:
    n_layers = len(heads_kv)
    if rule is None:
        return [False] * n_layers
    if rule.layers in ("all", "both"):
        return [True] * n_layers
    if rule.layers == "interval":
        if keys.has("attention.recurrent_layers"):
            return [flag > 0 for flag in keys.per_layer("attention.recurrent_layers", n_layers)]
        interval = max(1, keys.integer("full_attention_interval", rule.interval))
        return [index < n_trunk and (index + 1) % interval != 0 for index in range(n_layers)]
    n_ff = keys.per_layer("feed_forward_length", n_layers, 0) if rule.layers == "no_kv_no_ffn" else (0,) * n_layers
    return [index < n_trunk and heads_kv[index] == 0 and n_ff[index] == 0 for index in range(n_layers)]


def _cached_layers(keys: Keys, rule: _Recurrence | None, is_recurrent: list[bool], n_trunk: int) -> list[bool]:
    """Which layers have a KV cache of their own."""
    n_layers = len(is_recurrent)
    n_own = n_layers  # layers from here on read the caches of earlier ones
    if keys.arch == "gemma3n":
        n_own = 20
    elif keys.arch == "gemma4":
        n_own = n_layers - keys.integer("attention.shared_kv_layers", 0)
    if keys.arch not in _MTP_CACHED:
        n_own = min(n_own, n_trunk)
    if keys.arch in _NO_CACHE or (rule and rule.layers == "all"):
        return [False] * n_layers
    if rule and rule.layers == "no_kv_no_ffn":
        n_ff = keys.per_layer("feed_forward_length", n_layers, 0)
        return [index < n_own and not is_recurrent[index] and n_ff[index] == 0 for index in range(n_layers)]
    is_both = rule is not None and rule.layers == "both"
    return [index < n_own and (is_both or not is_recurrent[index]) for index in range(n_layers)]


def _caches(keys: Keys, layer: _Layer) -> list[KVCache]:
    if not layer.has_cache:
        return []
    k_elements = layer.k_length * layer.n_head_kv
    v_elements = 0 if layer.is_mla or keys.arch == "deepseek4" else layer.v_length * layer.n_head_kv
    main = KVCache(k_elements, v_elements, layer.window)
    if keys.arch != "deepseek4":
        return [main, *_indexer_caches(keys, layer)]
    ratio = keys.per_layer_at("attention.compress_ratios", layer.index)
    if ratio not in (_CSA_RATIO, _HCA_RATIO):
        return [main]
    caches = [main, KVCache(k_elements, 0, ratio=ratio)]
    if ratio == _CSA_RATIO:
        caches.append(KVCache(keys.integer("attention.indexer.key_length"), 0, ratio=ratio))
    return caches


def _indexer_caches(keys: Keys, layer: _Layer) -> list[KVCache]:
    """The keys that sparse attention picks positions by: one head per position, where the layer has an indexer."""
    arch = keys.arch
    length = keys.integer("attention.indexer.key_length", 0)
    is_full = True
    if arch == "glm-dsa" and not keys.has("attention.indexer.types"):  # GLM 5.2 (1M context) shares indexers
        is_full = keys.integer("context_length") < 1 << 20 or layer.index < 2 or layer.index % 4 == 2
    elif arch in ("glm-dsa", "glm5-next", "hy_v4", "dots3note") and keys.has("attention.indexer.types"):
        is_full = layer.is_trunk and keys.per_layer_at("attention.indexer.types", layer.index) > 0
    has_indexer = {
        "deepseek32": layer.is_trunk,
        "dots3note": keys.has("attention.indexer.types"),
        "glm-dsa": layer.is_trunk,
        "glm5-next": True,
        "hy_v4": keys.integer("attention.indexer.top_k", 0) > 0,
        "minimax-m3": layer.index >= keys.integer("leading_dense_block_count", 0),
        "qwen4exp": True,
    }.get(arch, False)
    if not (has_indexer and is_full and length):
        return []
    if arch in ("glm5-next", "qwen4exp"):
        return [KVCache(length * (3 if keys.integer("attention.indexer.kpool", 0) and arch == "glm5-next" else 1), 0)]
    return [KVCache(length, 0 if layer.is_mla else layer.v_length)]


def _state_bytes(keys: Keys, layer: _Layer) -> int:
    """Bytes of one sequence's recurrent state: what convolutions and recurrences carry from token to token."""
    if keys.arch == "deepseek4" and layer.is_trunk:
        return _compressor_bytes(keys, layer)
    rule = _RECURRENT.get(keys.arch)
    if rule is None or not layer.is_recurrent or not layer.is_trunk:
        return 0
    n_embd = keys.integer("embedding_length")
    if rule.state == "wkv":
        elements = n_embd * (keys.integer("token_shift_count", 2) + keys.integer("wkv.head_size"))
    elif rule.state == "shortconv":
        elements = n_embd * max(0, keys.integer("shortconv.l_cache") - 1)
    elif rule.state == "kda":
        length = keys.integer("kda.head_dim")
        n_conv = max(0, (keys.integer("ssm.conv_kernel", 0) or 4) - 1)
        elements = layer.n_head * length * (3 * n_conv + length)
    elif rule.state == "lightning":
        elements = layer.k_length * layer.k_length * layer.n_head
    else:
        inner, state = keys.integer("ssm.inner_size"), keys.integer("ssm.state_size")
        conv_width = inner + 2 * keys.integer("ssm.group_count", 0) * state
        elements = max(0, keys.integer("ssm.conv_kernel") - 1) * conv_width + state * inner
        if layer.index in (keys.array("ple.layers") or ()):
            history = max(0, keys.integer("ple.conv_kernel") - 1) * keys.integer("ple.ngram_size")
            elements += history * keys.integer("hyper_connection.count") * n_embd
    return elements * _F32


def _compressor_bytes(keys: Keys, layer: _Layer) -> int:
    """DeepSeek-V4: running sums and scores of the block being compressed (llama_dsv4_comp_state)."""
    ratio = keys.per_layer_at("attention.compress_ratios", layer.index)
    if ratio == _HCA_RATIO:
        return 2 * layer.k_length * ratio * _F32
    if ratio == _CSA_RATIO:
        return 2 * 2 * (layer.k_length + keys.integer("attention.indexer.key_length")) * 2 * ratio * _F32
    return 0
