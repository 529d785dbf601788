"""Names of quantizations, as people know them from file names.

Source: llama.cpp 0c1e57098, include/llama.h (llama_ftype).
"""

from __future__ import annotations

import re
from collections import Counter

from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import GGUFHeader

_GUESSED = 1024  # LLAMA_FTYPE_GUESSED, a flag

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0",
    41: "Q2_0",
}  # fmt: skip


def quant_label(header: GGUFHeader) -> str:
    """`Q4_K_M` if the file says so (`general.file_type`), else the tensor type that holds the most bytes."""
    file_type = header.metadata.get("general.file_type")
    if isinstance(file_type, int) and file_type & ~_GUESSED in FILE_TYPES:
        return FILE_TYPES[file_type & ~_GUESSED]
    held: Counter[int] = Counter()
    for tensor in header.tensors:
        held[tensor.ggml_type] += tensor.n_bytes
    for ggml_type, _ in held.most_common(1):
        return GGML_TYPES[ggml_type].name
    return "unknown"


# as in model-Q4_K_M.gguf, model.i1-IQ3_XS.gguf, UD-Q4_K_XL/model-00001-of-00002.gguf
_KIND = r"I?Q\d(?:_(?:\d|K|NL|XXS|XS|S|M|L|XL))*|TQ[12]_0|BF16|FP?(?:16|32)|MXFP4(?:_MOE)?|NVFP4"
_IN_NAME = re.compile(rf"(?<![A-Za-z0-9])((?:UD-)?(?:{_KIND}))(?![A-Za-z0-9])", re.IGNORECASE)


def quant_in_name(file: str) -> str:
    """The quantization that a file's name tells, in upper case, the last one if there are several; '' if none."""
    found = _IN_NAME.findall(file)
    return found[-1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else ""
