"""Which experts a model's routers choose: llama.cpp shows every node of its graph to a callback, and this one reads
the few that hold the choices and their weights.

    watch = Watch()
    with load(paths, header, plan, watch=watch) as session:
        for done in route(session, watch, tokens):
            watch.take()[3].experts  # layer 3's choices of this batch: token 0's experts, then token 1's

A context without a watch has no callback at all, so nothing here costs a normal answer anything.

Source: llama.cpp 0c1e57098, src/llama-graph.cpp `build_moe_ffn` (names of the nodes), ggml/src/ggml-backend.cpp
`ggml_backend_sched_compute_splits` (each node is asked for first, then shown with its data), ggml/include/ggml.h
`struct ggml_tensor`.
"""

from __future__ import annotations

import ctypes
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moelocal.engine import abi, llama
from moelocal.errors import MoelocalError

if TYPE_CHECKING:
    from moelocal.engine.session import Session

_N_BATCH = 256  # tokens at once: the logits of all of them are kept, see `route`
_CHOICE, _WEIGHTS, _OUTPUT = "topk", "weights", "down"
# the weights are normalised and scaled in steps, as the architecture wants: the last node is what is used
_NODE = re.compile(rb"ffn_moe_(topk|weights|down)(?:_softmax|_norm|_scaled|_biased)?-(\d+)")
_I32, _F32 = 26, 0  # enum ggml_type


class _Tensor(ctypes.Structure):
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


_NAME_AT = _Tensor.name.offset


@dataclass(slots=True)
class Choices:
    """What one layer's router chose: `experts` are ids, int32[n_tokens, n_used], each token's likeliest first;
    `weights` what their outputs were multiplied with, float32 of the same shape, or empty where they are not seen;
    `norms` the Euclidean norms of these outputs before that, or empty where they were not asked for."""

    n_used: int = 0
    experts: array[int] = field(default_factory=lambda: array("i"))
    weights: array[float] = field(default_factory=lambda: array("f"))
    norms: array[float] = field(default_factory=lambda: array("f"))

    @property
    def n_tokens(self) -> int:
        """Tokens that were routed here."""
        return len(self.experts) // self.n_used if self.n_used else 0


class Watch:
    """Collects choices per layer. Give it to `session.load`; one session has at most one.

    `outputs`: the norms of the experts' outputs too, which takes time.
    """

    n_batch = _N_BATCH

    def __init__(self, outputs: bool = False) -> None:
        self._kinds = {_CHOICE, _WEIGHTS, _OUTPUT} if outputs else {_CHOICE, _WEIGHTS}
        self.layers: dict[int, Choices] = {}
        self._known: dict[bytes, tuple[str, int] | None] = {}  # names of nodes, and what they are to us
        self._batch: dict[int, tuple[int, array[int]]] = {}  # of the batch that runs: layer, n_used and ids
        self._weights: dict[int, array[float]] = {}
        self._norms: dict[int, array[float]] = {}
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

    def take(self) -> dict[int, Choices]:
        """The choices since the last call, by layer."""
        taken, self.layers = self.layers, {}
        return taken

    def begin(self) -> None:
        """Before a batch: what an unfinished one left is dropped."""
        self._batch.clear()
        self._weights.clear()
        self._norms.clear()

    def commit(self) -> None:
        """After a batch: its choices count.

        Raises:
            MoelocalError: they could not be read.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            if isinstance(failure, MoelocalError):
                raise failure
            raise MoelocalError(
                "The choices of the experts could not be read from llama.cpp.",
                "This moelocal knows llama-cpp-python 0.3.36: pip install llama-cpp-python==0.3.36",
                (f"{type(failure).__name__}: {failure}",),
            ) from failure
        for layer, (n_used, ids) in self._batch.items():
            kept = self.layers.setdefault(layer, Choices(n_used))
            for values, so_far in (
                (self._weights.get(layer, ()), kept.weights),
                (self._norms.get(layer, ()), kept.norms),
            ):
                if len(values) == len(ids) and len(so_far) == len(kept.experts):
                    so_far.extend(values)
            kept.experts.extend(ids)
        self.begin()

    def _on_node(self, tensor: int, ask: bool, _: Any) -> bool:
        """llama.cpp's callback. An exception must not cross into C, where it would be lost: it is told by `commit`."""
        try:
            name = ctypes.string_at(tensor + _NAME_AT)
            try:
                what = self._known[name]
            except KeyError:
                match = _NODE.fullmatch(name)
                kind = "" if match is None else match[1].decode()
                what = (kind, int(match[2])) if match is not None and kind in self._kinds else None
                self._known[name] = what
            if ask:
                return what is not None
            if what is not None and self._failure is None:
                self._take(tensor, *what)
        except BaseException as error:
            self._failure = error
            return not ask  # go on: what is asked for no more is not shown
        return True

    def _take(self, pointer: int, kind: str, layer: int) -> None:
        tensor = _Tensor.from_address(pointer)
        if not self._checked:
            self._check(tensor, pointer)
        if kind == _CHOICE:
            # some architectures route twice in a layer; the second time groups of the same experts
            if layer not in self._batch:
                self._batch[layer] = int(tensor.ne[0]), self._ids(tensor, pointer)
        elif layer not in self._batch:
            return
        elif kind == _OUTPUT:
            self._norms[layer] = self._norms_of(tensor, pointer)
        else:
            floats = array("f")
            if tensor.type == _F32 and (n_bytes := self._n_bytes(pointer)) == 4 * len(self._batch[layer][1]):
                floats.frombytes(self._read(pointer, n_bytes))
                self._weights[layer] = floats

    def _check(self, tensor: _Tensor, pointer: int) -> None:
        """That this llama.cpp's tensors are as declared above.

        Raises:
            TypeError: they are not.
        """
        n_bytes = 4 + sum((tensor.ne[i] - 1) * tensor.nb[i] for i in range(4))
        if tensor.name != self._name(pointer) or n_bytes != self._n_bytes(pointer) or tensor.nb[0] != 4:
            raise TypeError("struct ggml_tensor has another layout")
        self._checked = True

    def _ids(self, tensor: _Tensor, pointer: int) -> array[int]:
        """The ids of a choice, int32[n_tokens, n_used] as a view of all experts sorted: rows lie `nb[1]` bytes apart.

        Raises:
            TypeError: no such tensor.
        """
        n_used, n_tokens, stride = int(tensor.ne[0]), int(tensor.ne[1]), int(tensor.nb[1]) // 4
        if tensor.type != _I32 or tensor.ne[2] * tensor.ne[3] != 1 or tensor.nb[1] % 4:
            raise TypeError(f"{tensor.name.decode(errors='replace')} is no matrix of int32")
        data = array("i")
        data.frombytes(self._read(pointer, self._n_bytes(pointer)))
        ids = array("i")
        for at in range(0, n_tokens * stride, stride):
            ids.extend(data[at : at + n_used])
        return ids

    def _norms_of(self, tensor: _Tensor, pointer: int) -> array[float]:
        """Norms of the experts' outputs, float32[n_tokens, n_used], of a tensor float32[n_tokens, n_used, n_embd].

        Raises:
            TypeError: no such tensor.
        """
        import numpy as np

        n_embd, n_used, n_tokens = int(tensor.ne[0]), int(tensor.ne[1]), int(tensor.ne[2])
        data = np.empty((n_tokens, n_used, n_embd), np.float32)
        if tensor.type != _F32 or tensor.ne[3] != 1 or self._n_bytes(pointer) != data.nbytes:
            raise TypeError(f"{tensor.name.decode(errors='replace')} is no block of float32")
        self._get(pointer, data.ctypes.data, 0, data.nbytes)
        return array("f", np.linalg.norm(data, axis=2).astype(np.float32).tobytes())

    def _read(self, pointer: int, n_bytes: int) -> bytes:
        data = ctypes.create_string_buffer(n_bytes)
        self._get(pointer, data, 0, n_bytes)
        return data.raw


def route(session: Session, watch: Watch, tokens: Sequence[int]) -> Iterator[int]:
    """Computes tokens from an empty memory; gives how many are done after each batch. `tokens` must fit the context.

    Every token's logits are asked for, though nobody reads them: the last layer leaves out the tokens without.

    Raises:
        KeyboardInterrupt: Ctrl-C; the watch has the finished batches.
        MoelocalError: llama.cpp failed, with its last words; the choices could not be read.
    """
    low, interrupt = session._low, session._interrupt
    step = min(session.plan.n_ubatch, session.plan.n_outputs, session.n_ctx)
    with interrupt:
        session.open()
        low.llama_memory_clear(session._memory, True)
        session.cached.clear()
        for at in range(0, len(tokens), step):
            ids = tokens[at : at + step]
            array_ = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to it, and to the marks
            marks = (ctypes.c_int8 * len(ids))(*[1] * len(ids))
            batch = low.llama_batch_get_one(array_, len(ids))
            batch.logits = ctypes.cast(marks, ctypes.POINTER(ctypes.c_int8))
            watch.begin()
            session._decode(batch, ids)
            low.llama_synchronize(session._context)
            watch.commit()
            yield at + len(ids)
    if interrupt.is_set():
        raise KeyboardInterrupt  # while the caller had a batch
