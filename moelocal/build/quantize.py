"""A GGUF file in smaller types, by llama.cpp's own quantizer.

    job = QuantizeJob(Path("model-F16.gguf"), made_here("model-Q4_K_M"), "Q4_K_M")
    result = quantize(job)

llama.cpp runs in a child process: it may abort, and Ctrl-C shall end it at once. Before a byte is written it says which
type every tensor would get, so that what cannot be is refused first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What to make of which file. `source` is the file or the first shard, `output` the file (with `keep_split` what
    the shards are named after). `type_name` is llama.cpp's mixture (`Q4_K_M`); types of single tensors, by names as in
    `GGML_TYPES`: `patterns` (regular expression, type) go before `tensor_types` (tensor's full name -> type).
    `threads` None: all cores."""

    source: Path
    output: Path
    type_name: str
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    patterns: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    imatrix: Path | None = None
    threads: int | None = None
    requantize: bool = False
    keep_split: bool = False
    replace: bool = False


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor and its types before and after, as ids of `GGML_TYPES`. `wanted`: the type that its shape did not
    allow, so that llama.cpp took `after` instead."""

    name: str
    shape: tuple[int, ...]
    before: int
    after: int
    bytes_before: int
    bytes_after: int
    wanted: int | None = None


@dataclass(frozen=True, slots=True)
class Preview:
    """What a job would make: `file_bytes` is what the output takes at most (a few KiB of metadata are estimated)."""

    changes: tuple[TensorChange, ...]
    bytes_in: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a job made. `outputs` are the file, or all shards; `bytes_in` and `bytes_out` sizes of files."""

    outputs: tuple[Path, ...]
    preview: Preview
    bytes_in: int
    bytes_out: int
    seconds: float
