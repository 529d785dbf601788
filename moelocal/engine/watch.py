"""Which experts a model's routers choose, and the weights of their outputs.

    watch = Watch()
    with load(paths, header, plan, watch=watch) as session:
        for done in route(session, watch, tokens):
            watch.take()[3].experts  # layer 3's choices of this batch: token 0's experts, then token 1's

Source: llama.cpp 0c1e57098, src/llama-graph.cpp `build_moe_ffn` (names of the nodes).
"""

from __future__ import annotations

import ctypes
import re
from array import array
from dataclasses import dataclass, field

from moelocal.engine.nodes import F32, I32, NAME_AT, NodeReader, Tensor

_CHOICE, _WEIGHTS, _OUTPUT = "topk", "weights", "down"
# the weights are normalised and scaled in steps, as the architecture wants: the last node is what is used
_NODE = re.compile(rb"ffn_moe_(topk|weights|down)(?:_softmax|_norm|_scaled|_biased)?-(\d+)")


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


class Watch(NodeReader):
    """Collects choices per layer. `outputs`: the norms of the experts' outputs too, which takes time."""

    what = "The choices of the experts"

    def __init__(self, outputs: bool = False) -> None:
        super().__init__()
        self._kinds = {_CHOICE, _WEIGHTS, _OUTPUT} if outputs else {_CHOICE, _WEIGHTS}
        self.layers: dict[int, Choices] = {}
        self._known: dict[bytes, tuple[str, int] | None] = {}  # names of nodes, and what they are to us
        self._batch: dict[int, tuple[int, array[int]]] = {}  # of the batch that runs: layer, n_used and ids
        self._weights: dict[int, array[float]] = {}
        self._norms: dict[int, array[float]] = {}

    def take(self) -> dict[int, Choices]:
        """The choices since the last call, by layer."""
        taken, self.layers = self.layers, {}
        return taken

    def begin(self) -> None:
        """See `NodeReader`."""
        self._batch.clear()
        self._weights.clear()
        self._norms.clear()

    def commit(self) -> None:
        """See `NodeReader`."""
        super().commit()
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

    def _wants(self, pointer: int) -> bool:
        name = ctypes.string_at(pointer + NAME_AT)
        try:
            return self._known[name] is not None
        except KeyError:
            match = _NODE.fullmatch(name)
            kind = "" if match is None else match[1].decode()
            self._known[name] = (kind, int(match[2])) if match is not None and kind in self._kinds else None
            return self._known[name] is not None

    def _take(self, pointer: int) -> None:
        known = self._known[ctypes.string_at(pointer + NAME_AT)]
        assert known is not None  # else it was not asked for
        kind, layer = known
        tensor = Tensor.from_address(pointer)
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
            if tensor.type == F32 and self._n_bytes(pointer) == 4 * len(self._batch[layer][1]):
                floats.frombytes(self._read(pointer).raw)
                self._weights[layer] = floats

    def _ids(self, tensor: Tensor, pointer: int) -> array[int]:
        """The ids of a choice, int32[n_tokens, n_used] as a view of all experts sorted: rows lie `nb[1]` bytes apart.

        Raises:
            TypeError: no such tensor.
        """
        n_used, n_tokens, stride = int(tensor.ne[0]), int(tensor.ne[1]), int(tensor.nb[1]) // 4
        if tensor.type != I32 or tensor.ne[2] * tensor.ne[3] != 1 or tensor.nb[1] % 4:
            raise TypeError(f"{tensor.name.decode(errors='replace')} is no matrix of int32")
        data = array("i")
        data.frombytes(self._read(pointer).raw)
        ids = array("i")
        for at in range(0, n_tokens * stride, stride):
            ids.extend(data[at : at + n_used])
        return ids

    def _norms_of(self, tensor: Tensor, pointer: int) -> array[float]:
        """Norms of the experts' outputs, float32[n_tokens, n_used], of a tensor float32[n_tokens, n_used, n_embd].

        Raises:
            TypeError: no such tensor.
        """
        import numpy as np

        n_embd, n_used, n_tokens = int(tensor.ne[0]), int(tensor.ne[1]), int(tensor.ne[2])
        if tensor.type != F32 or tensor.ne[3] != 1 or self._n_bytes(pointer) != 4 * n_embd * n_used * n_tokens:
            raise TypeError(f"{tensor.name.decode(errors='replace')} is no block of float32")
        data = np.frombuffer(self._read(pointer), np.float32).reshape(n_tokens, n_used, n_embd)
        return array("f", np.linalg.norm(data, axis=2).astype(np.float32).tobytes())
