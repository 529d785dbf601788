"""Small models made for measuring: a few layers whose weights are of one type, as wide as a real model's.

Random blocks, valid for every type: only their scales are set, so that all values stay finite. Nearly all bytes are in
the feed-forward part, dense or by expert, so two models of different width differ by known bytes of weights alone.
Experts are holes in the file where the system has them, which read as weights of zero: what they take in memory is
real, and on the disk nothing.
"""

from __future__ import annotations

import math
import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moelocal.model.ggml_types import GGML_TYPES

N_EMBD = 2048
N_VOCAB = 512
DENSE_WIDTH, EXPERT_WIDTH, BASE_WIDTH = 4096, 1024, 32
N_USED = 4
FILE_BYTES = 192 << 20  # of a model that is written: many times a CPU's caches
MAPPED_BYTES = (
    700 << 20
)  # of a file of holes: experts of real models lie so far apart that their pages' addresses, too,
# have to be looked up in memory, which costs mapped weights a tenth of their speed

_MIN_LAYERS, _MAX_LAYERS = 3, 8
_MIN_EXPERTS, _MAX_EXPERTS = 8, 32
_NEVER_ZERO = "MXFP4"  # a scale of zero would be a number that CPUs are slow with
_POOL_BYTES = 2 << 20
_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
_KINDS = {kind.name: kind for kind in GGML_TYPES.values()}
_SCALE = struct.pack("<e", 2.0**-10)
# Where a block keeps its scales, as halves. Source: llama.cpp 0c1e57098, ggml/src/ggml-common.h, `block_*`.
_SCALES_AT: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
_MXFP4_EXPONENT = 118  # 2 ** -10
_FLOATS = {"F16": 0x1C, "BF16": 0x3C, "F32": 0x3C}  # the upper byte of small values; sign and two bits stay random


@dataclass(frozen=True, slots=True)
class ProbeModel:
    """A model to be written: the type of its feed-forward weights, dense or by expert, and its size."""

    kind: str
    by_expert: bool
    n_layers: int
    width: int
    n_experts: int = _MIN_EXPERTS
    n_used: int = N_USED
    n_head: int = 4
    n_head_kv: int = 1
    head_dim: int = 64

    @property
    def attention_macs(self) -> int:
        """Multiplications of one token's queries with one position of the cache, in all layers."""
        return 2 * self.n_layers * self.n_head * self.head_dim

    @property
    def cache_bytes(self) -> int:
        """Bytes of one position of the cache (f16 keys and values), in all layers."""
        return 2 * 2 * self.n_layers * self.n_head_kv * self.head_dim

    @property
    def weights_per_layer(self) -> int:
        """Feed-forward weights that one token uses of a layer."""
        return 3 * N_EMBD * self.width * (self.n_used if self.by_expert else 1)

    @property
    def active_bytes(self) -> float:
        """Bytes of feed-forward weights that one token reads, of all layers."""
        return self.n_layers * type_bytes(self.kind, self.weights_per_layer)

    @property
    def held_bytes(self) -> float:
        """Bytes of all feed-forward weights."""
        return self.active_bytes * (self.n_experts / self.n_used if self.by_expert else 1)


def type_bytes(kind: str, n_weights: int) -> float:
    """Bytes of so many weights of a type."""
    return n_weights / _KINDS[kind].block_size * _KINDS[kind].type_bytes


def probe_model(kind: str, by_expert: bool, max_bytes: int = FILE_BYTES) -> ProbeModel:
    """The model that measures a type: as many layers as fit into `max_bytes`, at least three."""
    width, n_experts = (EXPERT_WIDTH, _MAX_EXPERTS) if by_expert else (DENSE_WIDTH, 1)
    ffn = 3 * type_bytes(kind, N_EMBD * width)
    while n_experts > _MIN_EXPERTS and n_experts * ffn * _MIN_LAYERS > max_bytes:
        n_experts //= 2
    n_layers = max(_MIN_LAYERS, min(_MAX_LAYERS, int(max_bytes / (n_experts * ffn))))
    return ProbeModel(kind, by_expert, n_layers, width, n_experts)


def has_holes(kind: str) -> bool:
    """Whether experts of a type can be holes in a file on this system."""
    return os.name == "posix" and kind != _NEVER_ZERO


def base_model(by_expert: bool, n_layers: int) -> ProbeModel:
    """The same with hardly any weights: what is left is the time that a layer and a token cost beside them.

    One expert is used: what others cost by their number of rows, however short, belongs to their speed.
    """
    return ProbeModel("Q8_0", by_expert, n_layers, BASE_WIDTH, 4, 1)


def attention_model(n_head_kv: int) -> ProbeModel:
    """Hardly any weights but many heads: the deeper the cache, the longer it takes, and only attention makes it so.

    The more of the heads have keys and values of their own, the larger the cache for the same multiplications.
    """
    return ProbeModel("Q8_0", False, _MIN_LAYERS, BASE_WIDTH, n_head=16, n_head_kv=n_head_kv, head_dim=128)


def random_blocks(kind: str, n_bytes: int, seed: int = 0) -> bytes:
    """About `n_bytes` of whole blocks: random, finite, small.

    Raises:
        KeyError: a type that this module does not know.
    """
    size = _KINDS[kind].type_bytes
    n = max(1, n_bytes // size)
    noise = random.Random(seed)
    out = bytearray(noise.randbytes(n * size))
    if kind in _FLOATS:
        small = bytes((byte & 0x83) | _FLOATS[kind] for byte in range(256))
        out[size - 1 :: size] = out[size - 1 :: size].translate(small)
    elif kind == "MXFP4":
        out[::size] = bytes([_MXFP4_EXPONENT]) * n
    else:
        for start in _SCALES_AT[kind]:
            out[start::size], out[start + 1 :: size] = bytes(_SCALE[:1]) * n, bytes(_SCALE[1:]) * n
    return bytes(out)


def write_probe_model(model: ProbeModel, path: Path) -> None:
    """Writes the model.

    Raises:
        OSError: no room, or no right to write.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "qwen3moe" if model.by_expert else "llama")
    try:
        _add_metadata(writer, model)
        tensors = list(_tensors(model))
        for name, shape, kind in tensors:
            n_bytes = round(type_bytes(kind, math.prod(shape)))
            number = GGMLQuantizationType(_NUMBERS[kind])
            writer.add_tensor_info(name, shape[::-1], np.dtype(np.float32), n_bytes, number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout  # opened by write_header_to_file
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        pools: dict[str, memoryview] = {}
        for _, shape, kind in tensors:
            if kind not in pools:
                pools[kind] = memoryview(random_blocks(kind, _POOL_BYTES))
            n_bytes = round(type_bytes(kind, math.prod(shape)))
            if len(shape) > 2 and has_holes(kind):
                out.seek(n_bytes, os.SEEK_CUR)
            else:
                _fill(out, pools[kind], n_bytes)
            writer.write_padding(out, n_bytes)
        out.truncate(out.tell())
    finally:
        writer.close()


def _fill(out: BinaryIO, pool: memoryview, n_bytes: int) -> None:
    while n_bytes > 0:
        n_bytes -= out.write(pool[:n_bytes])


def _tensors(model: ProbeModel) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape (row length first) and type of every tensor."""
    q, kv = model.n_head * model.head_dim, model.n_head_kv * model.head_dim
    found: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (N_EMBD, N_VOCAB), "F16"),
        ("output_norm.weight", (N_EMBD,), "F32"),
        ("output.weight", (N_EMBD, N_VOCAB), "Q8_0"),
    ]
    for i in range(model.n_layers):
        layer: list[tuple[str, tuple[int, ...], str]] = [
            ("attn_norm", (N_EMBD,), "F32"),
            ("attn_q", (N_EMBD, q), "Q8_0"),
            ("attn_k", (N_EMBD, kv), "Q8_0"),
            ("attn_v", (N_EMBD, kv), "Q8_0"),
            ("attn_output", (q, N_EMBD), "Q8_0"),
            ("ffn_norm", (N_EMBD,), "F32"),
        ]
        experts: tuple[int, ...] = (model.n_experts,) if model.by_expert else ()
        if model.by_expert:
            layer += [(f"attn_{name}_norm", (model.head_dim,), "F32") for name in "qk"]
            layer.append(("ffn_gate_inp", (N_EMBD, model.n_experts), "F32"))
        suffix = "_exps" if model.by_expert else ""
        layer += [(f"ffn_{name}{suffix}", (N_EMBD, model.width, *experts), model.kind) for name in ("gate", "up")]
        layer.append((f"ffn_down{suffix}", (model.width, N_EMBD, *experts), model.kind))
        found += [(f"blk.{i}.{name}.weight", shape, kind) for name, shape, kind in layer]
    return found


def _add_metadata(writer: object, model: ProbeModel) -> None:
    from gguf import GGUFWriter

    assert isinstance(writer, GGUFWriter)
    writer.add_block_count(model.n_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(model.width)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    if model.by_expert:
        writer.add_expert_count(model.n_experts)
        writer.add_expert_used_count(model.n_used)
        writer.add_expert_feed_forward_length(model.width)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    others = [f"t{i}" for i in range(N_VOCAB - 3 - len(bytes_))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_, *others])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * len(bytes_) + [1] * len(others))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
