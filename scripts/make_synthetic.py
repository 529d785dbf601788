"""Writes a GGUF of random weights in a real model's geometry: for benchmarks and tests without a download.

Speed and memory of a model depend on its shapes and types, not on what it learned. So the file has the tensors,
types and metadata that a real one would have; the weights are random, scaled so that a forward pass stays finite;
the tokenizer is a byte-level BPE with made-up merges, which reads any text and prints readable nonsense.

Random weights make tokens alike, so that routers choose the same few experts again and again. With `--skew 0` each
token's own embedding decides, and all experts are used alike, which no trained model does: the worst case for a cache.
With `--skew 1` some experts are liked more, in each layer others: the logits of a router get a constant for each
expert, of that standard deviation (the rest of them has 1). Of 128 experts, 8 used, a cache of 40 % then hits in nine
of ten cases, as with Qwen3-30B-A3B's own.

usage: python scripts/make_synthetic.py GEOMETRY OUT.gguf [--layers N] [--seed N] [--skew S] [--dry-run]
       (`list` names each GEOMETRY)
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

Mix = Literal["Q4_K_M", "Q8_0", "F16", "MXFP4"]
Type = GGMLQuantizationType
Value = int | float | bool | list[int]

FILE_TYPES: dict[Mix, int] = {"F16": 1, "Q8_0": 7, "Q4_K_M": 15, "MXFP4": 38}  # llama_ftype
POOL_BYTES = 4 << 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# With a skew: token embeddings of this standard deviation, in which the first value is constant and this large; and how
# much less than usual the layers add to it, so that it is as large in the last one.
EMBEDDED_STD, CONSTANT, ADDED = 3.0, 15.0, 0.1
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"  # by frequency in English: the first merges are then the likely ones


@dataclass(frozen=True, slots=True)
class Geometry:
    """The numbers that fix a model's tensors. `n_ff` is the dense FFN's width, `n_ff_exp` one expert's."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int | tuple[int, ...]
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    mix: Mix
    n_ff: int = 0
    n_ff_exp: int = 0
    n_expert: int = 0
    n_expert_used: int = 0
    n_expert_shared: int = 0
    n_dense_lead: int = 0
    fused_gate_up: bool = False
    rope_base: float = 10000.0
    skew: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def heads_kv(self, layer: int) -> int:
        """KV heads of one layer; 0 marks a recurrent layer."""
        return self.n_head_kv if isinstance(self.n_head_kv, int) else self.n_head_kv[layer]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to be written. `shape` as ggml counts it: the row length first."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def n_bytes(self) -> int:
        """Bytes of its data, without alignment."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


MLA: dict[str, Value] = {
    "attention.q_lora_rank": 64,
    "attention.kv_lora_rank": 64,
    "attention.key_length": 80,
    "attention.value_length": 64,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
    "rope.dimension_count": 16,
    "expert_weights_scale": 1.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
}
GEOMETRIES: dict[str, Geometry] = {
    # OLMoE's feed_forward_length is the width of one expert, so it goes into n_ff.
    "olmoe-1b-7b": Geometry(
        "olmoe", 16, 2048, 16, 16, 128, 50304, 4096, "Q4_K_M", n_ff=1024, n_expert=64, n_expert_used=8,
    ),
    "qwen3-30b-a3b": Geometry(
        "qwen3moe", 48, 2048, 32, 4, 128, 151936, 40960, "Q4_K_M", n_ff=6144, n_ff_exp=768, n_expert=128,
        n_expert_used=8, rope_base=1e6,
    ),
    "qwen3moe-400m": Geometry(
        "qwen3moe", 12, 1024, 16, 4, 64, 32768, 8192, "Q4_K_M", n_ff=2048, n_ff_exp=512, n_expert=32,
        n_expert_used=4, rope_base=1e6,
    ),
    "gpt-oss-20b": Geometry(
        "gpt-oss", 24, 2880, 64, 8, 64, 201088, 131072, "MXFP4", n_ff_exp=2880, n_expert=32, n_expert_used=4,
        rope_base=150000.0, extra={"attention.sliding_window": 128},
    ),
    "tiny-qwen3moe": Geometry(
        "qwen3moe", 4, 256, 4, 2, 64, 600, 4096, "Q4_K_M", n_ff=512, n_ff_exp=256, n_expert=10, n_expert_used=2,
        rope_base=1e6,
    ),
    "tiny-gptoss": Geometry(
        "gpt-oss", 4, 128, 4, 2, 32, 600, 4096, "MXFP4", n_ff_exp=128, n_expert=8, n_expert_used=2,
        extra={"attention.sliding_window": 32},
    ),
    "tiny-lfm2moe": Geometry(
        "lfm2moe", 6, 128, 4, (0, 0, 2, 0, 0, 2), 32, 600, 4096, "Q8_0", n_ff=256, n_ff_exp=64, n_expert=8,
        n_expert_used=2, n_dense_lead=2, rope_base=1e6, extra={"shortconv.l_cache": 3, "expert_gating_func": 2},
    ),
    "tiny-deepseek2": Geometry(
        "deepseek2", 4, 128, 4, 1, 32, 600, 4096, "Q8_0", n_ff=256, n_ff_exp=64, n_expert=8, n_expert_used=2,
        n_expert_shared=1, n_dense_lead=1, extra=MLA,
    ),
    "tiny-llama4": Geometry(
        "llama4", 4, 128, 4, 2, 32, 600, 4096, "Q8_0", n_ff=128, n_ff_exp=64, n_expert=8, n_expert_used=1,
        n_expert_shared=1, extra={"interleave_moe_layer_step": 1},
    ),
    "tiny-dense": Geometry("llama", 4, 128, 4, 2, 32, 600, 4096, "F16", n_ff=256),
}  # fmt: skip
GEOMETRIES["qwen3moe-250m"] = replace(GEOMETRIES["qwen3moe-400m"], n_layer=6)
GEOMETRIES["tiny-deepseek2-groups"] = replace(
    GEOMETRIES["tiny-deepseek2"],
    n_expert=16,
    n_expert_used=4,
    extra=MLA | {"expert_group_count": 4, "expert_group_used_count": 2},
)
GEOMETRIES["tiny-deepseek2-fused"] = replace(GEOMETRIES["tiny-deepseek2"], fused_gate_up=True)

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def attention(g: Geometry, layer: int) -> Shapes:
    """Grouped-query attention with what each architecture adds to it: norms of q and k, biases, sinks."""
    q, kv = g.n_head * g.head_dim, g.heads_kv(layer) * g.head_dim
    yield "attn_q.weight", (g.n_embd, q)
    yield "attn_k.weight", (g.n_embd, kv)
    yield "attn_v.weight", (g.n_embd, kv)
    yield "attn_output.weight", (q, g.n_embd)
    if g.arch in ("qwen3moe", "lfm2moe"):
        yield "attn_q_norm.weight", (g.head_dim,)
        yield "attn_k_norm.weight", (g.head_dim,)
    if g.arch == "olmoe":
        yield "attn_q_norm.weight", (q,)
        yield "attn_k_norm.weight", (kv,)
    if g.arch == "gpt-oss":
        yield "attn_sinks.weight", (g.n_head,)
        for name, n in (("q", q), ("k", kv), ("v", kv), ("output", g.n_embd)):
            yield f"attn_{name}.bias", (n,)


def latent_attention(g: Geometry) -> Shapes:
    """DeepSeek's MLA, absorbed: one latent KV head, `k_b` and `v_b` per query head."""
    sizes = {k: int(v) for k, v in g.extra.items() if isinstance(v, int)}
    q_rank, kv_rank = sizes["attention.q_lora_rank"], sizes["attention.kv_lora_rank"]
    k_dim, v_dim = sizes["attention.key_length_mla"], sizes["attention.value_length_mla"]
    rope = sizes["rope.dimension_count"]
    yield "attn_q_a.weight", (g.n_embd, q_rank)
    yield "attn_q_a_norm.weight", (q_rank,)
    yield "attn_q_b.weight", (q_rank, g.n_head * k_dim)
    yield "attn_kv_a_mqa.weight", (g.n_embd, kv_rank + rope)
    yield "attn_kv_a_norm.weight", (kv_rank,)
    yield "attn_k_b.weight", (k_dim - rope, kv_rank, g.n_head)
    yield "attn_v_b.weight", (kv_rank, v_dim, g.n_head)
    yield "attn_output.weight", (g.n_head * v_dim, g.n_embd)


def short_convolution(g: Geometry) -> Shapes:
    """LFM2's recurrent layer: a short convolution between two projections."""
    yield "shortconv.in_proj.weight", (g.n_embd, 3 * g.n_embd)
    yield "shortconv.conv.weight", (int(g.extra["shortconv.l_cache"]), g.n_embd)
    yield "shortconv.out_proj.weight", (g.n_embd, g.n_embd)


def feed_forward(g: Geometry, layer: int) -> Shapes:
    """A dense FFN in the leading layers and in dense models, else router, routed experts and shared ones."""
    if layer < g.n_dense_lead or not g.n_expert:
        yield "ffn_gate.weight", (g.n_embd, g.n_ff)
        yield "ffn_up.weight", (g.n_embd, g.n_ff)
        yield "ffn_down.weight", (g.n_ff, g.n_embd)
        return
    width = g.n_ff_exp or g.n_ff
    yield "ffn_gate_inp.weight", (g.n_embd, g.n_expert)
    if g.fused_gate_up:
        yield "ffn_gate_up_exps.weight", (g.n_embd, 2 * width, g.n_expert)
    else:
        yield "ffn_gate_exps.weight", (g.n_embd, width, g.n_expert)
        yield "ffn_up_exps.weight", (g.n_embd, width, g.n_expert)
    yield "ffn_down_exps.weight", (width, g.n_embd, g.n_expert)
    if g.arch in ("lfm2moe", "deepseek2"):
        yield "exp_probs_b.bias", (g.n_expert,)
    if g.arch == "gpt-oss":
        yield "ffn_gate_inp.bias", (g.n_expert,)
        for name, n in (("gate", width), ("up", width), ("down", g.n_embd)):
            yield f"ffn_{name}_exps.bias", (n, g.n_expert)
    if shared := g.n_expert_shared * width:
        yield "ffn_gate_shexp.weight", (g.n_embd, shared)
        yield "ffn_up_shexp.weight", (g.n_embd, shared)
        yield "ffn_down_shexp.weight", (shared, g.n_embd)


def layer_shapes(g: Geometry, layer: int) -> Shapes:
    yield "attn_norm.weight", (g.n_embd,)
    yield ("post_attention_norm.weight" if g.arch == "gpt-oss" else "ffn_norm.weight"), (g.n_embd,)
    if g.arch == "deepseek2":
        yield from latent_attention(g)
    elif g.heads_kv(layer) == 0:
        yield from short_convolution(g)
    else:
        yield from attention(g, layer)
    yield from feed_forward(g, layer)


def uses_more_bits(layer: int, n_layer: int) -> bool:
    """Whether Q4_K_M stores this layer's attn_v and ffn_down as Q6_K.

    Source: llama.cpp commit 0c1e57098, src/llama-quant.cpp, `use_more_bits`.
    """
    return layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2


def tensor_type(g: Geometry, name: str, shape: tuple[int, ...], layer: int) -> Type:
    """The type that llama.cpp's quantizer gives a tensor in the geometry's mix.

    Models of exactly 8 experts have rules of their own in Q4_K_M, which are left out here: no such geometry uses it.
    """
    if len(shape) == 1 or not name.endswith(".weight") or "norm" in name or re.search("ffn_gate_inp|conv.conv", name):
        return Type.F32
    if g.mix == "F16":
        return Type.F16
    if g.skew is not None and name == "token_embd.weight":
        return Type.Q8_0
    if g.mix == "MXFP4":
        return Type.MXFP4 if "_exps" in name else Type.Q8_0
    if g.mix == "Q8_0":
        return Type.Q8_0
    more = layer >= 0 and re.search("attn_v|ffn_down", name) and uses_more_bits(layer, g.n_layer)
    return Type.Q6_K if more or name == "output.weight" else Type.Q4_K


def tensors(g: Geometry) -> list[Tensor]:
    """All tensors in the order in which llama.cpp's quantizer writes them: by layer, then by name."""
    norm = "token_embd_norm.weight" if g.arch == "lfm2moe" else "output_norm.weight"
    head = [("token_embd.weight", (g.n_embd, g.n_vocab)), (norm, (g.n_embd,))]
    if g.arch != "lfm2moe":  # its output matrix is the embedding
        head.append(("output.weight", (g.n_embd, g.n_vocab)))
    found = [Tensor(name, shape, tensor_type(g, name, shape, -1)) for name, shape in sorted(head)]
    for layer in range(g.n_layer):
        for name, shape in sorted(layer_shapes(g, layer)):
            found.append(Tensor(f"blk.{layer}.{name}", shape, tensor_type(g, name, shape, layer)))
    return found


def packed_q4_k_scales(scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The 12 bytes of 8 six-bit scales and 8 six-bit minima; here both are `scales`: uint8[n, 8] below 64.

    Source: llama.cpp commit 0c1e57098, ggml/src/ggml-quants.c, `get_scale_min_k4`.
    """
    low, high = scales[:, :4], scales[:, 4:]
    first = low | (high >> 4 << 6)
    return np.concatenate([first, first, (high & 0x0F) | (high & 0x0F) << 4], axis=1)


def random_blocks(kind: Type, std: float, n: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """uint8[n, block_bytes]: valid blocks whose weights have about zero mean and the standard deviation `std`."""
    block_bytes = GGML_QUANT_SIZES[kind][1]
    if kind in (Type.F32, Type.F16):
        floats = rng.standard_normal(n, dtype=np.float32) * np.float32(std)
        return np.frombuffer(floats.astype(f"<f{block_bytes}").tobytes(), np.uint8).reshape(n, block_bytes)
    out: np.ndarray[Any, Any] = rng.integers(0, 256, (n, block_bytes), dtype=np.uint8)

    def half(value: float) -> np.ndarray[Any, Any]:
        return np.broadcast_to(np.array([value], np.float16).view(np.uint8), (n, 2))

    if kind is Type.Q4_K:  # weight = d * scale * q - dmin * min, q in 0..15: minima equal to scales, dmin = 7.5 d
        scales = rng.integers(32, 64, (n, 8), dtype=np.uint8)
        d = std / (4.61 * 48.4)
        out[:, 0:2], out[:, 2:4], out[:, 4:16] = half(d), half(7.5 * d), packed_q4_k_scales(scales)
    elif kind is Type.Q6_K:  # weight = d * scale * q, q in -32..31; scales of both signs cancel the mean of -0.5
        signs = rng.choice(np.array([-1, 1], np.int8), (n, 16))
        out[:, 192:208] = (signs * rng.integers(32, 64, (n, 16), dtype=np.int8)).view(np.uint8)
        out[:, 208:210] = half(std / (18.5 * 48.4))
    elif kind is Type.Q8_0:  # weight = d * q
        out[:, 0:2] = half(std / 73.9)
    elif kind is Type.MXFP4:  # weight = 2**(e - 128) * q, q of root mean square 5.85
        out[:, 0] = round(math.log2(std / 5.85)) + 128
    else:
        raise ValueError(f"no random blocks of type {kind.name}")
    return out


class Weights:
    """Makes tensor data from one pool of random blocks per type and scale, cut at random places.

    So 18 GB cost little more than writing them, in memory for a few pools.
    """

    def __init__(self, seed: int, skew: float | None = None) -> None:
        self.skew = skew
        self.rng = np.random.default_rng(seed)
        self.pool = lru_cache(maxsize=8)(self._pool)

    def _pool(self, kind: Type, std: float) -> np.ndarray[Any, Any]:
        return random_blocks(kind, std, POOL_BYTES // GGML_QUANT_SIZES[kind][1], self.rng)

    def write(self, tensor: Tensor, out: BinaryIO) -> None:
        """Appends the tensor's data, without padding."""
        if "norm" in tensor.name:
            out.write((1 + 0.1 * self.rng.standard_normal(tensor.shape[0])).astype(np.float32).tobytes())
            return
        if self.skew is not None and tensor.name == "token_embd.weight":
            out.write(self._embedding(tensor).data)
            return
        if self.skew is not None and tensor.name.endswith("ffn_gate_inp.weight"):
            out.write(self._router(tensor).data)
            return
        std = weight_std(tensor)
        if self.skew is not None and re.search("attn_output|ffn_down", tensor.name):
            std *= ADDED
        pool = self.pool(tensor.type, std)
        left = tensor.n_bytes // pool.shape[1]
        while left:
            start = int(self.rng.integers(0, len(pool)))
            piece = pool[start : start + left]
            out.write(piece.data)
            left -= len(piece)

    def _embedding(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """Rows of Q8_0 whose first value is constant: its block has the largest weight there."""
        n_blocks, n_rows = tensor.shape[0] // 32, tensor.shape[1]
        blocks = np.empty((n_rows, n_blocks, 34), np.uint8)
        scale = np.array([CONSTANT / 127], np.float16)
        blocks[:, :, :2] = scale.view(np.uint8)
        for row in blocks:  # one at a time: the float numbers of all would take gigabytes
            weights = self.rng.standard_normal((n_blocks, 32), np.float32) * np.float32(EMBEDDED_STD / scale[0])
            row[:, 2:] = weights.round().clip(-127, 127).astype(np.int8).view(np.uint8)
        blocks[:, 0, 2] = 127
        return blocks

    def _router(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """Rows of a router: what it sees first is the constant, as large as the norm before leaves it."""
        n_embd, n_expert = tensor.shape
        rows: np.ndarray[Any, Any] = self.rng.standard_normal((n_expert, n_embd), np.float32) * np.float32(n_embd**-0.5)
        seen = CONSTANT / math.sqrt(EMBEDDED_STD**2 + CONSTANT**2 / n_embd)
        rows[:, 0] = (self.skew or 0.0) * self.rng.standard_normal(n_expert) / seen
        return rows


def weight_std(tensor: Tensor) -> float:
    """Keeps activations near 1: matrices by their row length; the head wider, so that one token stands out."""
    if not tensor.name.endswith(".weight") or len(tensor.shape) == 1:
        return 0.1
    gain = 3.0 if tensor.name in ("output.weight", "token_embd.weight") else 1.0
    return float(gain * tensor.shape[0] ** -0.5)


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes, in byte order.

    Source: openai/gpt-2, src/encoder.py, `bytes_to_unicode`.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (chr(256 + i) for i in itertools.count())
    return [chr(b) if b in printable else next(others) for b in range(256)]


def made_up_merges(n: int) -> list[tuple[str, str]]:
    """`n` merges whose results are `n` different pieces of 2, then 3, then 4 letters; a space only in front."""
    rank = {letter: i for i, letter in enumerate("Ġ" + LETTERS)}
    pairs = sorted(itertools.product("Ġ" + LETTERS, LETTERS), key=lambda pair: rank[pair[0]] + rank[pair[1]])
    words = ["".join(p) for p in pairs]
    inner = [w for w in words if w[0] != "Ġ"]
    every = itertools.chain(pairs, itertools.product(words, LETTERS), itertools.product(words, inner))
    merges = list(itertools.islice(every, n))
    if len(merges) < n:
        raise ValueError(f"only {len(merges)} made-up tokens, {n} asked for")
    return merges


def add_tokenizer(writer: GGUFWriter, n_vocab: int) -> None:
    """A vocabulary of `n_vocab`: bytes, made-up pieces, and the control tokens at the end, as Qwen has them."""
    merges = made_up_merges(n_vocab - 256 - len(CONTROL_TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*byte_tokens(), *(a + b for a, b in merges), *CONTROL_TOKENS])
    writer.add_token_types([1] * (n_vocab - len(CONTROL_TOKENS)) + [3] * len(CONTROL_TOKENS))
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_bos_token_id(n_vocab - 3)
    writer.add_pad_token_id(n_vocab - 3)
    writer.add_eos_token_id(n_vocab - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def add_metadata(writer: GGUFWriter, name: str, g: Geometry) -> None:
    """What llama.cpp needs to know of the geometry; the architecture's own keys come from `extra`."""
    writer.add_type("model")
    writer.add_name(f"synthetic {name}")
    writer.add_description("Random weights in the geometry of a real model, for benchmarks and tests.")
    writer.add_file_type(FILE_TYPES[g.mix])
    writer.add_quantization_version(2)
    values: dict[str, Value] = {
        "block_count": g.n_layer,
        "context_length": g.n_ctx_train,
        "embedding_length": g.n_embd,
        "feed_forward_length": g.n_ff or g.n_ff_exp,
        "vocab_size": g.n_vocab,
        "attention.head_count": g.n_head,
        "attention.head_count_kv": g.n_head_kv if isinstance(g.n_head_kv, int) else list(g.n_head_kv),
        "attention.key_length": g.head_dim,
        "attention.value_length": g.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": g.rope_base,
        "rope.dimension_count": g.head_dim,
        "expert_count": g.n_expert,
        "expert_used_count": g.n_expert_used,
        "expert_feed_forward_length": g.n_ff_exp,
        "expert_shared_count": g.n_expert_shared,
        "leading_dense_block_count": g.n_dense_lead,
        **g.extra,
    }
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in values.items():
        if value:  # zeros say "has none", as in real files
            adders[type(value)](f"{g.arch}.{key}", value)


def chosen(geometry: str, skew: float | None = None, n_layer: int | None = None) -> Geometry:
    """The geometry of that name, with only its first layers if `n_layer` is given.

    Raises:
        KeyError: no such geometry.
    """
    g = GEOMETRIES[geometry]
    return replace(g, skew=skew, n_layer=g.n_layer if n_layer is None else min(n_layer, g.n_layer))


def write_model(
    geometry: str, path: Path, seed: int = 0, skew: float | None = None, n_layer: int | None = None
) -> None:
    """Writes that geometry (see `chosen`) to `path`, the same bytes for the same seed.

    Raises:
        KeyError: no such geometry.
    """
    g = chosen(geometry, skew, n_layer)
    todo = tensors(g)
    writer = GGUFWriter(path, g.arch)
    add_metadata(writer, geometry, g)
    add_tokenizer(writer, g.n_vocab)
    for tensor in todo:
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.n_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout  # opened by write_header_to_file
    out = writer.fout[0]
    weights = Weights(seed, skew)
    writer.write_padding(out, out.tell())
    for tensor in todo:
        weights.write(tensor, out)
        writer.write_padding(out, tensor.n_bytes)
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=[*GEOMETRIES, "list"])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, help="how much some experts are liked more: 1 as in Qwen3, 0 not at all")
    parser.add_argument("--layers", type=int, help="only the first of them: as fast per layer, in less room")
    parser.add_argument("--dry-run", action="store_true", help="only compute the size")
    args = parser.parse_args()
    names = list(GEOMETRIES) if args.geometry == "list" else [args.geometry]
    for name in names:
        todo = tensors(chosen(name, args.skew, args.layers))
        n_bytes, n_params = sum(t.n_bytes for t in todo), sum(math.prod(t.shape) for t in todo)
        print(f"{name:22} {n_bytes / 1e9:7.3f} GB of tensors, {n_params / 1e9:7.3f} billion weights")
    if args.geometry == "list" or args.dry_run:
        return 0
    if args.out is None:
        parser.error("OUT.gguf is missing")
    write_model(args.geometry, args.out, args.seed, args.skew, args.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
