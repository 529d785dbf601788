"""The logits of a text's tokens, one batch at a time, where llama.cpp wrote them: nothing is copied.

    for start, n, floats in chunk_logits(session, tokens, range(256, 511)):
        rows = numpy.frombuffer(floats, "f4").reshape(n, -1)  # of positions start .. start + n - 1

Source: llama.cpp 0c1e57098, include/llama.h: llama_batch (positions follow the memory where `pos` is NULL; `logits`
marks the tokens that give some), llama_get_logits (rows in the order of the batch, n_vocab floats each).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moelocal.engine.abi import marked_batch
from moelocal.engine.session import Session


class Rows(NamedTuple):
    """Logits of the positions `start` to `start + n - 1`: `floats` is a buffer of float32[n * n_vocab], valid until the
    session computes again."""

    start: int
    n: int
    floats: Any


def chunk_logits(session: Session, tokens: Sequence[int], wanted: range) -> Iterator[Rows]:
    """Computes a chunk from an empty memory, and gives the logits of the positions `wanted` as each batch has them.

    Raises:
        KeyboardInterrupt: Ctrl-C, within one batch.
        MoelocalError: llama.cpp failed, with its last words; see `Session.open`.
    """
    low, step = session._low, min(session.plan.n_ubatch, session.n_ctx)
    n_vocab, interrupt = session.n_vocab, session._interrupt
    with interrupt:
        session.open()
        low.llama_memory_clear(session._memory, True)
        session.cached.clear()
        for at in range(0, len(tokens), step):
            ids = tokens[at : at + step]
            marks = [position in wanted for position in range(at, at + len(ids))]
            batch, _held = marked_batch(low, ids, marks)
            session._decode(batch, ids)
            n = sum(marks)
            if n:
                pointer = ctypes.cast(low.llama_get_logits(session._context), ctypes.c_void_p)  # waits for a GPU
                assert pointer.value is not None
                yield Rows(max(at, wanted.start), n, (ctypes.c_float * (n * n_vocab)).from_address(pointer.value))
    if interrupt.is_set():
        raise KeyboardInterrupt  # while the caller had the last rows
