"""What goes into a model's matrices: for every weight tensor the sum of squares of its inputs, column by column, and
over how many tokens; of experts apart, since each sees other tokens. This is what an importance matrix is made of.

Source: llama.cpp 0c1e57098, tools/imatrix/imatrix.cpp `IMatrixCollector::collect_imatrix`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from moelocal.engine import abi, llama
from moelocal.engine.nodes import F32, I32, OP_AT, NodeReader, Tensor
from moelocal.errors import MoelocalError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAST_ROWS = 16  # of a dense matrix's input: llama-imatrix ignores shorter ones
_OPS = 256  # more than ggml has
_OUTPUT = "output.weight"


@dataclass(slots=True)
class Inputs:
    """One tensor's: `sums` float32[n_matrices, n_inputs] of squares, `counts` float64[n_matrices] of tokens. A dense
    tensor of several matrices (MLA's) has all of them in one row, as in llama.cpp's file format."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float64]


class Activations(NodeReader):
    """Collects the inputs of every tensor of the layers; `with_output`: of the output matrix too."""

    what = "The inputs of the weights"

    def __init__(self, with_output: bool = False) -> None:
        super().__init__()
        self.tensors: dict[str, Inputs] = {}
        self._with_output = with_output
        self._last: tuple[tuple[int, ...], Any] | None = None  # gate and up, or q, k and v, have the same input

    @cached_property
    def _ops(self) -> tuple[int, int]:
        """The numbers of GGML_OP_MUL_MAT and GGML_OP_MUL_MAT_ID, which differ between versions."""
        name = abi.declare(llama.api(), "ggml_op_name", [ctypes.c_int], ctypes.c_char_p)
        names: list[bytes] = []
        while len(names) < _OPS and (not names or names[-1] != b"MUL_MAT_ID"):
            names.append(name(len(names)))
        return names.index(b"MUL_MAT"), names.index(b"MUL_MAT_ID")

    def begin(self) -> None:
        """See `NodeReader`."""
        self._last = None

    def _wants(self, pointer: int) -> bool:
        dense, by_expert = self._ops
        op = ctypes.c_int.from_address(pointer + OP_AT).value
        if op == by_expert:
            return True
        if op != dense:
            return False
        weights, inputs = (Tensor.from_address(at) for at in Tensor.from_address(pointer).src[:2])
        if inputs.ne[1] < _LEAST_ROWS or inputs.type != F32:
            return False
        name = _name_of(weights)
        return name.startswith("blk.") or (self._with_output and name == _OUTPUT)

    def _take(self, pointer: int) -> None:
        node = Tensor.from_address(pointer)
        weights, given = Tensor.from_address(node.src[0]), Tensor.from_address(node.src[1])
        if given.type != F32:
            raise TypeError(f"the input of {_name_of(weights)} is not float32")
        if node.op == self._ops[1]:
            key: tuple[int, ...] = (node.src[1], node.src[2], weights.ne[2])
            sums, counts = self._once(key, lambda: self._of_experts(given, node, int(weights.ne[2])))
        else:
            key = (node.src[1], weights.ne[2], weights.ne[3])
            sums, counts = self._once(key, lambda: self._of_dense(given, node, weights))
        self._add(_name_of(weights), sums, counts)

    def _once(self, key: tuple[int, ...], compute: Any) -> Any:
        """What was computed last, if it was of the same tensors of this batch."""
        if self._last is None or self._last[0] != key:
            self._last = key, compute()
        return self._last[1]

    def _add(self, name: str, sums: NDArray[np.float32], counts: NDArray[np.float64]) -> None:
        """Adds a batch.

        Raises:
            MoelocalError: a number that is none, which would spoil all that follows.
        """
        if not np.isfinite(sums).all():
            raise MoelocalError(
                f"The inputs of {name} are not finite: the model computes nonsense.",
                "Check the file: moelocal show MODEL; another text does not help.",
            )
        if name in self.tensors:
            held = self.tensors[name]
            held.sums += sums
            held.counts += counts
        else:
            self.tensors[name] = Inputs(sums.copy(), counts.copy())

    def _of_experts(
        self, given: Tensor, node: Tensor, n_experts: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Inputs float32[n_tokens, 1 or n_used, n_inputs], each chosen expert's summed up."""
        chosen = Tensor.from_address(node.src[2])
        if chosen.type != I32:
            raise TypeError("expert ids are not int32")
        ids = self._array(chosen, node.src[2], np.int32)[0, 0]  # [n_tokens, n_used]
        squares = np.square(self._array(given, node.src[1], np.float32)[0])  # [n_tokens, 1 or n_used, n_inputs]
        flat = ids.ravel()
        counts = np.bincount(flat, minlength=n_experts)
        if len(counts) > n_experts or flat.min() < 0:
            raise TypeError("expert ids beyond the experts")
        order = np.argsort(flat, kind="stable")
        token, slot = np.divmod(order, ids.shape[1])
        rows = squares[token, slot % squares.shape[1]]
        sums = np.zeros((n_experts, squares.shape[2]), np.float32)
        used = np.flatnonzero(counts)
        starts = (np.cumsum(counts) - counts)[used]
        sums[used] = np.add.reduceat(rows, starts, axis=0)
        return sums, counts.astype(np.float64)

    def _of_dense(
        self, given: Tensor, node: Tensor, weights: Tensor
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Inputs float32[.., .., n_rows, n_inputs], summed up for each matrix that they go into."""
        squares = np.square(self._array(given, node.src[1], np.float32)).sum(axis=2)
        n3, n2 = int(weights.ne[3]), int(weights.ne[2])
        sums = np.zeros((n3, n2, squares.shape[2]), np.float32)
        np.add.at(
            sums,
            (np.arange(squares.shape[0])[:, None] % n3, np.arange(squares.shape[1])[None] % n2),
            squares,
        )
        n_rows = given.ne[1] * given.ne[2] * given.ne[3]
        return sums.reshape(1, -1), np.array([n_rows // (n2 * n3)], np.float64)

    def _array(self, tensor: Tensor, pointer: int, kind: Any) -> NDArray[Any]:
        """A tensor's values, outermost dimension first."""
        if tensor.nb[0] != np.dtype(kind).itemsize:
            raise TypeError(f"{_name_of(tensor)} has gaps in its rows")
        flat = np.frombuffer(self._read(pointer), np.uint8)
        shape, strides = tuple(tensor.ne[::-1]), tuple(tensor.nb[::-1])
        return as_strided(flat[: np.dtype(kind).itemsize].view(kind), shape, strides, writeable=False)


def _name_of(tensor: Tensor) -> str:
    """A tensor's name; a copy on another device has it between `#`."""
    name: str = tensor.name.decode(errors="replace")
    return name.split("#")[1] if "#" in name else name
