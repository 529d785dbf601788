"""A model in another quantization, from the header of one: to plan every file of a repository from one header. Pure.

    resized(header, "Q6_K", 25_092_532_544)    # what the header of a file of that name and size would be, about

Weights take the type that the quantization is named after, then all are scaled to the file's true size: so the sum is
exact, and speeds are those of that type. Weights trained in MXFP4 stay so, as in every file of such a model.
"""

from __future__ import annotations

import math
from dataclasses import replace

from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import GGUFHeader, TensorInfo
from moelocal.model.quants import FILE_TYPES

_IDS = {kind.name: number for number, kind in GGML_TYPES.items()}
# mixes that are not named after the type of most of their weights
_TYPES = {"Q8_K": "Q8_0", "IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ2_M": "IQ2_S", "MXFP4_MOE": "MXFP4", "FP16": "F16"}
_TYPES |= {"FP32": "F32"}
_KEPT = {_IDS["F32"], _IDS["MXFP4"]}


def main_type(quant: str) -> str | None:
    """The tensor type that a quantization is named after: `Q4_K` for `UD-Q4_K_XL`; None for an unknown name."""
    name = quant.upper().removeprefix("UD-")
    while name:
        if name in _TYPES or name in _IDS:
            return _TYPES.get(name, name)
        name = name.rpartition("_")[0]
    return None


def resized(header: GGUFHeader, quant: str, n_bytes: int) -> GGUFHeader:
    """The header with weights of another quantization, `n_bytes` for the whole file. An unknown one keeps the types."""
    wanted = main_type(quant)
    tensors = [_retyped(tensor, wanted) for tensor in header.tensors]
    scaled = [_is_scaled(tensor) for tensor in header.tensors]
    fixed = sum(tensor.n_bytes for tensor, free in zip(tensors, scaled, strict=True) if not free)
    free_bytes = sum(tensor.n_bytes for tensor in tensors) - fixed
    target = n_bytes - header.data_offset - fixed
    ratio = target / free_bytes if free_bytes and target > 0 else 1.0
    made = [
        tensor._replace(n_bytes=int(tensor.n_bytes * ratio)) if free else tensor
        for tensor, free in zip(tensors, scaled, strict=True)
    ]
    names = {label: number for number, label in FILE_TYPES.items()}
    file_type = names.get(quant.upper().removeprefix("UD-"), header.metadata.get("general.file_type"))
    metadata = {**header.metadata, "general.file_type": file_type}
    return replace(header, metadata=metadata, tensors=tuple(made), file_bytes=n_bytes)


def _is_scaled(tensor: TensorInfo) -> bool:
    return len(tensor.shape) > 1 and tensor.ggml_type not in _KEPT


def _retyped(tensor: TensorInfo, wanted: str | None) -> TensorInfo:
    kind = GGML_TYPES[_IDS[wanted]] if wanted else None
    if kind is None or not _is_scaled(tensor) or tensor.shape[0] % kind.block_size:
        return tensor
    n_bytes = math.prod(tensor.shape) // kind.block_size * kind.type_bytes
    return tensor._replace(ggml_type=_IDS[kind.name], n_bytes=n_bytes)
