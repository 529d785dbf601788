"""llama.cpp's quantizer, called. What it does and finds it says in its log (`llama.LOG`); it may abort the process, and
does not return before it is done: see `build/quantize_child.py`.

Source: llama.cpp 0c1e57098, include/llama.h (`llama_model_quantize_params`), tools/quantize/quantize.cpp (how arrays
are filled and ended), src/llama-quant.cpp (what each setting does).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelocal.engine import llama

_KV_INT, _KV_STR = 0, 3  # enum llama_model_kv_override_type
_VALUE_BYTES = 127  # of a text in llama_model_kv_override
# a tensor's rows are converted in pieces of this size, which changes no byte; llama-quantize takes 8 GiB
_MAX_BUFFER_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """`file_type` is a llama_ftype; types of tensors are ggml_types. `overrides`: regular expression and type, the
    first that finds a tensor's name counts. `imatrix`: tensor's name -> float32[n_matrices * n_inputs], means of
    squared inputs. `metadata`: keys to add; numbers become uint32."""

    file_type: int
    threads: int
    overrides: Sequence[tuple[str, int]] = ()
    output_type: int | None = None
    embedding_type: int | None = None
    only_copy: bool = False
    requantize: bool = False
    keep_split: bool = False
    imatrix: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, int | str] = field(default_factory=dict)


def run(source: Path, output: Path, settings: Settings, is_dry: bool = False) -> bool:
    """Quantizes `source` (its first shard) into `output`; whether that went well. `is_dry`: only says, in the log, what
    each tensor would become."""
    low = llama.api()
    params = low.llama_model_quantize_default_params()
    params.nthread, params.ftype = settings.threads, settings.file_type
    if settings.output_type is not None:
        params.output_tensor_type = settings.output_type
    if settings.embedding_type is not None:
        params.token_embedding_type = settings.embedding_type
    params.allow_requantize, params.only_copy = settings.requantize, settings.only_copy
    params.keep_split, params.dry_run = settings.keep_split, is_dry
    params.max_buf_size = _MAX_BUFFER_BYTES
    held = [_overrides(low, settings), _imatrix(low, settings), _metadata(low, settings)]
    params.tt_overrides, params.imatrix, params.kv_overrides = held
    llama.LOG.lines.clear()
    return int(low.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(params))) == 0


def _overrides(low: Any, settings: Settings) -> Any:
    """The array of overrides, which ends with an entry without a pattern; None: there are none."""
    array = (low.llama_model_tensor_override * (len(settings.overrides) + 1))()
    for entry, (pattern, ggml_type) in zip(array, settings.overrides, strict=False):
        entry.pattern, entry.type = pattern.encode(), ggml_type
    return array if settings.overrides else None


def _imatrix(low: Any, settings: Settings) -> Any:
    """The array of importances, which ends with an entry without a name; it points into `settings.imatrix`."""
    array = (low.llama_model_imatrix_data * (len(settings.imatrix) + 1))()
    for entry, (name, values) in zip(array, settings.imatrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return array if settings.imatrix else None


def _metadata(low: Any, settings: Settings) -> Any:
    """The array of metadata to add, which ends with an empty key."""
    array = (low.llama_model_kv_override * (len(settings.metadata) + 1))()
    for entry, (key, value) in zip(array, settings.metadata.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = _KV_INT, value
        else:
            text = value.encode(errors="replace")[:_VALUE_BYTES].decode(errors="ignore")  # no half letter at the end
            entry.tag, entry.value.val_str = _KV_STR, text.encode()
    return array if settings.metadata else None
