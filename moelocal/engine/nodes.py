"""What llama.cpp computes on the way: it shows every node of its graph to a callback, and readers take what they need.

    reader = Watch()                                  # or `activations.Activations`, `saliency.Saliency`
    with load(paths, header, plan, watch=reader) as session:
        for done in route(session, reader, tokens):
            ...                                       # the reader has what it read in the batches so far

A context without a reader has no callback at all, so nothing here costs a normal answer anything.

Source: llama.cpp 0c1e57098, ggml/src/ggml-backend.cpp `ggml_backend_sched_compute_splits` (each node is asked for
first, then shown with its data), ggml/include/ggml.h `struct ggml_tensor`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moelocal.engine import abi, llama
from moelocal.errors import MoelocalError

if TYPE_CHECKING:
    from moelocal.engine.session import Session

F32, I32 = 0, 26  # enum ggml_type
_N_BATCH = 256  # tokens at once: the logits of all of them are kept, see `route`


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


NAME_AT, OP_AT = Tensor.name.offset, Tensor.op.offset


class NodeReader(ABC):
    """Reads some nodes of every batch. Give it to `session.load`; one session has at most one."""

    n_batch = _N_BATCH
    what = "What llama.cpp computes"  # for the message when it cannot be read

    def __init__(self) -> None:
        self._failure: BaseException | None = None
        self._checked = False

    @cached_property
    def callback(self) -> Any:
        """The function for `llama_context_params.cb_eval`; made when asked for, since it opens the library."""
        low = llama.api()
        self._get = abi.declare(low, "ggml_backend_tensor_get", [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2, None)
        self._n_bytes = abi.declare(low, "ggml_nbytes", [ctypes.c_void_p], ctypes.c_size_t)
        self._name = abi.declare(low, "ggml_get_name", [ctypes.c_void_p], ctypes.c_char_p)
        return low.ggml_backend_sched_eval_callback(self._on_node)

    @abstractmethod
    def begin(self) -> None:
        """Before a batch: what an unfinished one left is dropped."""

    def commit(self) -> None:
        """After a batch: what was read counts.

        Raises:
            MoelocalError: it could not be read.
        """
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if isinstance(failure, MoelocalError):
            raise failure
        raise MoelocalError(
            f"{self.what} could not be read from llama.cpp.",
            "This moelocal knows llama-cpp-python 0.3.36: pip install llama-cpp-python==0.3.36",
            (f"{type(failure).__name__}: {failure}",),
        ) from failure

    @abstractmethod
    def _wants(self, pointer: int) -> bool:
        """Whether to be shown a node, by its address."""

    @abstractmethod
    def _take(self, pointer: int) -> None:
        """Reads a node that was wanted, now computed."""

    def _on_node(self, pointer: int, ask: bool, _: Any) -> bool:
        """llama.cpp's callback. An exception must not cross into C, where it would be lost: it is told by `commit`."""
        try:
            if ask:
                return self._wants(pointer)
            if self._failure is None:
                if not self._checked:
                    self._check(Tensor.from_address(pointer), pointer)
                self._take(pointer)
        except BaseException as error:
            self._failure = error
            return not ask  # go on: what is asked for no more is not shown
        return True

    def _check(self, tensor: Tensor, pointer: int) -> None:
        """That this llama.cpp's tensors are as declared above.

        Raises:
            TypeError: they are not.
        """
        n_bytes = 4 + sum((tensor.ne[i] - 1) * tensor.nb[i] for i in range(4))
        if tensor.name != self._name(pointer) or n_bytes != self._n_bytes(pointer) or tensor.nb[0] != 4:
            raise TypeError("struct ggml_tensor has another layout")
        self._checked = True

    def _read(self, pointer: int) -> Any:
        """A tensor's bytes, from where the first value is to where the last one ends."""
        n_bytes = self._n_bytes(pointer)
        data = ctypes.create_string_buffer(n_bytes)
        self._get(pointer, data, 0, n_bytes)
        return data


def route(session: Session, reader: NodeReader, tokens: Sequence[int]) -> Iterator[int]:
    """Computes tokens from an empty memory; gives how many are done after each batch. `tokens` must fit the context.

    Every token's logits are asked for, though nobody reads them: the last layer leaves out the tokens without.

    Raises:
        KeyboardInterrupt: Ctrl-C; the reader has the finished batches.
        MoelocalError: llama.cpp failed, with its last words; the nodes could not be read.
    """
    low, interrupt = session._low, session._interrupt
    step = min(session.plan.n_ubatch, session.plan.n_outputs, session.n_ctx)
    with interrupt:
        session.open()
        low.llama_memory_clear(session._memory, True)
        session.cached.clear()
        for at in range(0, len(tokens), step):
            ids = tokens[at : at + step]
            batch, _held = abi.marked_batch(low, ids, [True] * len(ids))
            reader.begin()
            session._decode(batch, ids)
            low.llama_synchronize(session._context)
            reader.commit()
            yield at + len(ids)
    if interrupt.is_set():
        raise KeyboardInterrupt  # while the caller had a batch
