"""KV-cache arithmetic: how many cells llama.cpp allocates for a context, and what a cell takes in each type."""

from __future__ import annotations

from typing import Literal, NamedTuple

from moelocal.errors import BadRequest
from moelocal.model.ggml_types import GGML_TYPES

KVType = Literal["f16", "q8_0", "q4_0"]

_TYPES = {kind.name.lower(): kind for kind in GGML_TYPES.values()}
_CELL_PADDING = 256


class KVCache(NamedTuple):
    """One cache of one layer: values per cell for keys and for values, and how many cells a context takes.

    `window`: only so many positions are kept (None: all). `ratio`: one cell stands for so many positions.
    """

    k_elements: int
    v_elements: int
    window: int | None = None
    ratio: int = 1

    def cells(self, n_ctx: int, n_ubatch: int) -> int:
        """Cells for one sequence of n_ctx tokens, n_ubatch of which are computed at once (`swa_full=False`).

        Source: llama.cpp 0c1e57098, src/llama-context.cpp (n_ctx), src/llama-kv-cache-iswa.cpp (size_swa),
        src/llama-kv-cache-dsv4.cpp (dsv4_comp_size).
        """
        cells = _pad(n_ctx)
        if self.ratio > 1:
            cells = _pad(max(1, -(-cells // self.ratio)))
        return cells if self.window is None else _pad(min(cells, self.window + n_ubatch))

    def n_bytes(self, n_ctx: int, kv_type: KVType, n_ubatch: int) -> int:
        """Bytes of the cache.

        Raises:
            BadRequest: the keys or values of a cell do not divide into the type's blocks.
        """
        rows = row_bytes(self.k_elements, kv_type) + row_bytes(self.v_elements, kv_type)
        return self.cells(n_ctx, n_ubatch) * rows


def row_bytes(n_elements: int, kv_type: KVType) -> int:
    """Bytes of n_elements values stored as kv_type.

    Raises:
        BadRequest: they do not divide into the type's blocks.
    """
    kind = _TYPES[kv_type]
    if n_elements % kind.block_size:
        raise BadRequest(
            f"This model's KV cache cannot be {kv_type}: {n_elements} values do not divide by {kind.block_size}.",
            "Use f16 for the KV cache.",
        )
    return n_elements // kind.block_size * kind.type_bytes


def fits_heads(head_lengths: tuple[int, ...], kv_type: KVType) -> bool:
    """Whether llama.cpp accepts the cache type: each head's keys and values divide into its blocks.

    Source: llama.cpp 0c1e57098, src/llama-context.cpp, llama_init_from_model.
    """
    return all(length % _TYPES[kv_type].block_size == 0 for length in head_lengths)


def _pad(cells: int) -> int:
    return -(-cells // _CELL_PADDING) * _CELL_PADDING
