"""An importance matrix made from a text: chunk after chunk through the model, and what goes into each weight added up.

    work = Unfinished(key)                                      # what an interrupted run left, if it was the same
    for step in collect(session, activations, layout, work):    # a Step after each chunk
        ...
    imatrix_file.write(part, matrix(activations, layout, step.n_done, dataset))

Chunks and their beginning are those of llama-imatrix, so that matrices compare.

Source: llama.cpp 0c1e57098, tools/imatrix/imatrix.cpp `compute_imatrix`.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moelocal.build.imatrix_file import Imatrix, Importance, read, write
from moelocal.build.output import writing
from moelocal.engine.activations import Activations, Inputs
from moelocal.engine.nodes import route
from moelocal.errors import MoelocalError
from moelocal.paths import user_home

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moelocal.engine.session import Session
    from moelocal.model.header import GGUFHeader

_SAVE_S = 20.0  # an interrupted run loses no more, nor a twentieth of its time
_SAVE_SHARE = 0.05
_ENTRY_BYTES = 512  # of two rows in the file's table, with the padding of their data
_STALE_S = 14 * 24 * 3600
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(?:down|up|gate_up)_exps\.weight")


class Layout(NamedTuple):
    """The text in chunks: `tokens`, of which each chunk takes `n_ctx`; `n_chunks` of them are used."""

    tokens: Sequence[int]
    n_ctx: int
    n_chunks: int


class Step(NamedTuple):
    """After a chunk: chunks done; by how much of itself the last one changed a tensor's mean inputs, on average (1.0
    after the first); the share of all experts that some token chose (1.0 without experts)."""

    n_done: int
    change: float
    seen_share: float


class Unfinished:
    """What was collected so far, on disk, for going on. `key` stands for all that the result depends on."""

    def __init__(self, key: str) -> None:
        self.path = user_home() / "imatrix" / f"{key}.gguf"

    def load(self) -> Imatrix | None:
        """What an earlier run left; None: nothing that can be used."""
        try:
            return read(self.path)
        except MoelocalError:
            return None

    def save(self, imatrix: Imatrix) -> None:
        """Keeps it.

        Raises:
            MoelocalError: no room, or no right to write.
        """
        with writing(self.path, replace=True) as part:
            write(part, imatrix)

    def remove(self) -> None:
        """Forgets it, and others that nobody went on with for two weeks."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            for other in self.path.parent.glob("*.gguf"):
                if time.time() - other.stat().st_mtime > _STALE_S:
                    other.unlink()


def collect(session: Session, activations: Activations, layout: Layout, unfinished: Unfinished) -> Iterator[Step]:
    """Runs the chunks that are still to come; the first Step tells how many were done before.

    Raises:
        KeyboardInterrupt: Ctrl-C; what was saved last is kept.
        MoelocalError: llama.cpp failed, or nothing can be saved.
    """
    n_done = _restore(activations, unfinished, layout.n_chunks)
    before = _means(activations)
    yield Step(n_done, 0.0 if n_done else 1.0, seen_share(activations.tensors))
    saved, cost_s = time.monotonic(), 0.0
    while n_done < layout.n_chunks:
        tokens = list(layout.tokens[n_done * layout.n_ctx : (n_done + 1) * layout.n_ctx])
        if session.begin is not None:
            tokens[0] = session.begin
        for _ in route(session, activations, tokens):
            pass
        n_done += 1
        means = _means(activations)
        yield Step(n_done, _change(before, means), seen_share(activations.tensors))
        before, now = means, time.monotonic()
        if n_done < layout.n_chunks and now - saved > max(_SAVE_S, cost_s / _SAVE_SHARE):
            unfinished.save(matrix(activations, layout, n_done, ""))
            saved = time.monotonic()
            cost_s = saved - now


def matrix(activations: Activations, layout: Layout, n_done: int, dataset: str) -> Imatrix:
    """What was collected, as a file holds it."""
    entries = {
        name: Importance(inputs.sums, inputs.counts.astype(np.float32)) for name, inputs in activations.tensors.items()
    }
    return Imatrix(entries, (dataset,), n_done, layout.n_ctx)


def most_bytes(header: GGUFHeader) -> int:
    """What the matrix of a model takes at most, as a file: a number for each input, and the count, of each matrix."""
    matrices = [tensor for tensor in header.tensors if len(tensor.shape) > 1 and "weight" in tensor.name]
    return sum(4 * (tensor.shape[0] + 1) * math.prod(tensor.shape[2:]) + _ENTRY_BYTES for tensor in matrices)


def seen_share(tensors: Mapping[str, Inputs]) -> float:
    """How many of all experts some token chose, as a share."""
    counts = [inputs.counts for name, inputs in tensors.items() if _EXPERTS.fullmatch(name)]
    n_all = sum(map(len, counts))
    return sum(int((one > 0).sum()) for one in counts) / n_all if n_all else 1.0


def unseen(entries: Mapping[str, Importance]) -> dict[int, list[int]]:
    """Experts that no token chose, by layer."""
    found: dict[int, list[int]] = {}
    for name, entry in entries.items():
        if (match := _EXPERTS.fullmatch(name)) and entry.n_unseen:
            found[int(match[1])] = np.flatnonzero(entry.counts == 0).tolist()
    return dict(sorted(found.items()))


def _restore(activations: Activations, unfinished: Unfinished, n_most: int) -> int:
    """Puts back what an earlier run left, unless that had more chunks than are wanted now. Returns its chunks."""
    earlier = unfinished.load()
    if earlier is None or earlier.n_chunks > n_most:
        return 0
    activations.tensors = {
        name: Inputs(entry.sums.copy(), entry.counts.astype(np.float64)) for name, entry in earlier.entries.items()
    }
    return earlier.n_chunks


def _means(activations: Activations) -> list[NDArray[np.float32]]:
    """Mean squared input of each tensor, over all of its matrices: float32[n_inputs] each."""
    return [
        inputs.sums.sum(axis=0) / np.float32(max(1.0, inputs.counts.sum())) for inputs in activations.tensors.values()
    ]


def _change(before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]]) -> float:
    """Mean over the tensors of |after - before| / |after|."""
    if not before:
        return 1.0
    shares = []
    for old, new in zip(before, after, strict=False):
        norm = float(np.linalg.norm(new))
        shares.append(float(np.linalg.norm(new - old)) / norm if norm else 0.0)
    return float(np.mean(shares)) if shares else 0.0


def default_output(model: Path) -> Path:
    """Where the matrix of a model goes, and where `quantize` looks for it."""
    from moelocal.model.store import made_folder
    from moelocal.model.stored import stem_of

    return made_folder() / f"{stem_of(model.name)}.imatrix.gguf"
