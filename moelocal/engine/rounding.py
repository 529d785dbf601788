"""What ggml's types make of weights: rounded to a type and read back, by the functions of llama.cpp's quantizer.

Source: llama.cpp 0c1e57098, ggml/include/ggml.h (`ggml_type_traits`, `ggml_quantize_chunk`), ggml/src/ggml.c.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moelocal.engine import abi, llama
from moelocal.model.ggml_types import GGML_TYPES

if TYPE_CHECKING:
    import numpy as np

_F32 = 0


class _Traits(ctypes.Structure):
    """`ggml_type_traits`, up to what is needed."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    ]


@lru_cache(maxsize=64)
def _to_float(ggml_type: int) -> Any:
    traits = abi.declare(llama.api(), "ggml_get_type_traits", [ctypes.c_int], ctypes.POINTER(_Traits))
    address = traits(ggml_type).contents.to_float
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address)


@lru_cache(maxsize=1)
def _quantize() -> Any:
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    arguments = [ctypes.c_int, pointer, pointer, wide, wide, wide, pointer]
    return abi.declare(llama.api(), "ggml_quantize_chunk", arguments, ctypes.c_size_t)


def decoded(ggml_type: int, raw: np.ndarray[Any, Any], n_values: int) -> np.ndarray[Any, Any]:
    """Weights as numbers. `raw`: uint8 of whole blocks, contiguous. Gives float32[n_values]."""
    import numpy as np

    if ggml_type == _F32:
        plain: np.ndarray[Any, Any] = raw.view(np.float32)
        return plain[:n_values]
    values = np.empty(n_values, np.float32)
    _to_float(ggml_type)(raw.ctypes.data, values.ctypes.data, n_values)
    return values


def rounded(
    ggml_type: int, rows: np.ndarray[Any, Any], importance: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """Rows after a trip through a type.

    Args:
        rows: float32[n_rows, n_columns], contiguous; the type's blocks must divide the columns.
        importance: float32[n_columns], contiguous: mean square of each column's input; None: all alike.

    Returns:
        float32[n_rows, n_columns].
    """
    import numpy as np

    n_rows, n_columns = rows.shape
    kind = GGML_TYPES[ggml_type]
    raw = np.empty(rows.size // kind.block_size * kind.type_bytes, np.uint8)
    weights = None if importance is None else importance.ctypes.data
    _quantize()(ggml_type, rows.ctypes.data, raw.ctypes.data, 0, n_rows, n_columns, weights)
    made: np.ndarray[Any, Any] = decoded(ggml_type, raw, rows.size).reshape(rows.shape)
    return made
