"""What each type would lose of each tensor: measured on sampled rows of the real weights.

    errors = measure(header, tensors, imatrix, threads=2)
    errors["blk.0.ffn_down_exps.weight"][12]    # of its output's energy, what Q4_K turns into noise

The error of a matrix is that of what it gives out: sum_j E[x_j^2] sum_i (w_ij - q_ij)^2, relative to the same sum of
w_ij^2; E[x_j^2] is the importance matrix's, or 1. Of a stack, experts are drawn by how often they are used. Weights are
rounded by ggml's own functions, with the importances that llama.cpp's quantizer will give them.

What that costs the model is, as long as it is small, about linear in these errors (the linearity theorem of HIGGS,
arXiv 2411.17525): KL = sum of sensitivity * error. How the sensitivities were measured: docs/quantize-budget.md.
"""

from __future__ import annotations

import math
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from moelocal.build.types import STARVING
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.header import GGUFHeader, TensorInfo

if TYPE_CHECKING:
    import numpy as np

    from moelocal.build.imatrix_file import Imatrix, Importance

_SENSITIVITIES = (
    (r"token_embd", 10.0),
    (r"^output\.", 8.0),
    (r"ffn_(gate|up|gate_up)(_(exps|chexps|shexp))?\.|ffn_(gate|up)\.\d+\.", 0.8),
    (r"ffn_down", 2.5),
    (r"attn_(q|k)\.", 2.0),
)
_USUAL = 3.0  # of everything else that every token uses: values, outputs of attention, recurrent layers

Errors = dict[int, float]  # by type of GGML_TYPES
Tell = Callable[[int, int], None]

_N_EXPERTS = 8  # drawn of a stack
_N_VALUES = 1 << 16  # of a tensor, about: the error is then known within 3 %
_IDS = {kind.name: number for number, kind in GGML_TYPES.items()}
_ALWAYS = ("Q2_K", "Q3_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
_WEIGHTED = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # only where there are importances


def candidates(tensor: TensorInfo, is_weighted: bool) -> list[int]:
    """Types that a tensor may get: those whose blocks divide its rows. `is_weighted`: it has importances."""
    names = (*_WEIGHTED, *_ALWAYS) if is_weighted else _ALWAYS
    ids = [_IDS[name] for name in names]
    return [
        one for one in ids if tensor.shape[0] % GGML_TYPES[one].block_size == 0 and (is_weighted or one not in STARVING)
    ]


def type_bytes(tensor: TensorInfo, ggml_type: int) -> int:
    """What a tensor takes in a file in a type, with the padding behind it."""
    kind = GGML_TYPES[ggml_type]
    return -(-(math.prod(tensor.shape) // kind.block_size * kind.type_bytes) // 32) * 32


def sensitivity(name: str) -> float:
    """How much KL divergence a tensor brings for its output's relative error."""
    return next((value for pattern, value in _SENSITIVITIES if re.search(pattern, name)), _USUAL)


def measure(
    header: GGUFHeader,
    tensors: Sequence[TensorInfo],
    imatrix: Imatrix | None,
    threads: int,
    on_progress: Tell = lambda done, of: None,
) -> dict[str, Errors]:
    """Relative errors by tensor and type. A few rows at a time are in memory.

    Args:
        on_progress: gets how many tensors are measured, of how many.
    """
    from moelocal.engine import llama

    llama.api()  # once, before the threads ask for it
    entries = {} if imatrix is None else imatrix.entries
    todo, done = deque(tensors), Queue[tuple[str, Errors | BaseException]]()

    def work() -> None:
        with suppress(IndexError):
            while True:
                tensor = todo.popleft()
                try:
                    done.put((tensor.name, _errors(header, tensor, entries.get(tensor.name))))
                except BaseException as error:
                    done.put((tensor.name, error))

    # No pool: Python waits for its threads at exit, and for IQ types ggml computes tables for seconds in one call.
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    found: dict[str, Errors] = {}
    try:
        while len(found) < len(tensors):
            name, result = done.get()
            if isinstance(result, BaseException):
                raise result
            found[name] = result
            on_progress(len(found), len(tensors))
    finally:
        todo.clear()
    return found


def _errors(header: GGUFHeader, tensor: TensorInfo, importance: Importance | None) -> Errors:
    """A tensor's error in every type that it may get."""
    import numpy as np

    from moelocal.engine.rounding import rounded

    types = candidates(tensor, importance is not None)
    noise, energy = dict.fromkeys(types, 0.0), 0.0
    for matrix in _drawn(tensor, importance):
        rows = _rows(header, tensor, matrix)
        weights = None if importance is None else _weights(importance, matrix, tensor.shape[0])
        scale: Any = np.ones(tensor.shape[0], np.float32) if weights is None else weights
        energy += float(np.square(rows).sum(axis=0, dtype=np.float64) @ scale)
        for one in types:
            error = rounded(one, rows, weights)
            np.subtract(error, rows, out=error)
            noise[one] += float(np.square(error).sum(axis=0, dtype=np.float64) @ scale)
    return {one: value / energy if energy > 0 else 0.0 for one, value in noise.items()}


def _drawn(tensor: TensorInfo, importance: Importance | None) -> list[int]:
    """Which matrices of a stack to look at: evenly over their use, so that one used twice as much counts twice."""
    import numpy as np

    n = tensor.shape[2] if len(tensor.shape) > 2 else 1
    use = np.ones(n) if importance is None or importance.counts.size != n else importance.counts.astype(np.float64)
    if use.sum() <= 0:
        use = np.ones(n)
    at = (np.arange(min(n, _N_EXPERTS)) + 0.5) / min(n, _N_EXPERTS)
    drawn = np.searchsorted(np.cumsum(use) / use.sum(), at)
    return [int(one) for one in np.minimum(drawn, n - 1)]


def _rows(header: GGUFHeader, tensor: TensorInfo, matrix: int) -> np.ndarray[Any, Any]:
    """Rows of one matrix, spread evenly: float32[n_rows, n_columns]."""
    import numpy as np

    from moelocal.engine.rounding import decoded

    n_columns, n_rows = tensor.shape[0], tensor.shape[1]
    n_matrices = min(_N_EXPERTS, tensor.shape[2] if len(tensor.shape) > 2 else 1)
    count = max(1, min(n_rows, _N_VALUES // n_matrices // n_columns))
    kind = GGML_TYPES[tensor.ggml_type]
    row_bytes = n_columns // kind.block_size * kind.type_bytes
    path = Path(header.shards[tensor.shard])
    start = tensor.offset + matrix * n_rows * row_bytes
    table = np.memmap(path, np.uint8, "r", start, (n_rows, row_bytes))
    taken = np.ascontiguousarray(table[(np.arange(count) * n_rows) // count])
    return decoded(tensor.ggml_type, taken.reshape(-1), count * n_columns).reshape(count, n_columns)


def _weights(importance: Importance, matrix: int, n_columns: int) -> np.ndarray[Any, Any] | None:
    """A matrix's importances, as llama.cpp's quantizer takes them: float32[n_columns]."""
    import numpy as np

    means = importance.means().reshape(-1, n_columns)
    return np.ascontiguousarray(means[matrix if matrix < len(means) else 0], np.float32)
