"""A model scored on a text, chunk by chunk: run(session, text, ...) -> Result.

Only one batch's logits exist at a time, in llama.cpp's own buffer; what is worked out from them takes blocks of rows,
one per thread. The arithmetic is in perplexity.py and divergence.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from moelocal.engine.logits import Rows, chunk_logits
from moelocal.errors import MoelocalError
from moelocal.measure.checkpoint import Checkpoint, State
from moelocal.measure.divergence import Distance, Saved, Shifts, compare, encode, quantile
from moelocal.measure.perplexity import Layout, Tally, blocks, score

if TYPE_CHECKING:
    from array import array

    from moelocal.engine.session import Session
    from moelocal.measure.divergence import Words
    from moelocal.measure.logits_file import LogitsWriter
    from moelocal.measure.perplexity import Doubles, Floats, Tokens

_QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p95": 0.95, "kl_p99": 0.99, "kl_p999": 0.999, "kl_max": 1.0}


class Text(NamedTuple):
    """A text as token ids, and how it is cut."""

    tokens: array[int]
    layout: Layout


class Reference(Protocol):
    """Where the reference's log-probabilities come from."""

    def rows(self, chunk: int, start: int, targets: list[int]) -> Saved:
        """Rows of a chunk's scored positions, from `start` on, one for each target; in the order of the text."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """What came out. `quantiles` of the divergence by name, empty without a reference. `arithmetic_s` of the `seconds`
    went into our own arithmetic; both are those of this process, which may have done only the rest."""

    layout: Layout
    tally: Tally
    distance: Distance | None
    quantiles: dict[str, float]
    seconds: float
    arithmetic_s: float

    def as_json(self) -> dict[str, Any]:
        """The figures as `eval --json` prints them; those of a comparison are null without one."""
        distance = self.distance
        kl, agreement, base, ratio = (
            (distance.kl_mean, distance.agreement, distance.base_perplexity, self.ratio)
            if distance
            else ((None, None),) * 4
        )
        return {
            "n_tokens": self.tally.count,
            "perplexity": self.tally.perplexity,
            "perplexity_stderr": self.tally.stderr,
            "kl_mean": kl[0],
            "kl_stderr": kl[1],
            **{name: self.quantiles.get(name) for name in _QUANTILES},
            "top1_agreement": agreement[0],
            "top1_stderr": agreement[1],
            "p_diff_rms": distance.p_diff_rms if distance else None,
            "reference_perplexity": base[0],
            "reference_perplexity_stderr": base[1],
            "perplexity_ratio": ratio[0],
            "perplexity_ratio_stderr": ratio[1],
            "n_ctx": self.layout.n_ctx,
            "n_chunks": self.layout.n_chunks,
            "seconds": round(self.seconds, 3),
            "arithmetic_share": round(self.arithmetic_s / self.seconds, 4) if self.seconds else None,
        }

    @property
    def ratio(self) -> tuple[float, float]:
        """Perplexity by the reference's, and the standard error; there must be one."""
        assert self.distance is not None
        return self.distance.ratio(self.tally.nll, self.tally.nll2)


def run(
    session: Session,
    text: Text,
    checkpoint: Checkpoint,
    reference: Reference | None = None,
    writer: LogitsWriter | None = None,
    report: Callable[[State], None] | None = None,
) -> Result:
    """Scores a text from where the checkpoint stands.

    Args:
        reference: compared with; None: perplexity alone. The checkpoint must have been made for it.
        writer: gets the model's own log-probabilities.
        report: called after each chunk.

    Raises:
        KeyboardInterrupt: Ctrl-C; the checkpoint has the chunks that were complete.
        MoelocalError: llama.cpp failed, gave no numbers, or a disk is full.
    """
    import numpy as np

    state, layout, begin = checkpoint.state, text.layout, time.perf_counter()
    bos = session.begin
    with ThreadPoolExecutor(session.plan.threads) as pool:
        work = _Work(pool, writer)
        for index in range(state.n_done, layout.n_chunks):
            targets = layout.targets(text.tokens, index)
            nlls: list[Doubles] = []
            kls: list[Doubles] = []
            tokens = layout.chunk(text.tokens, index, bos)
            found = []
            for rows in chunk_logits(session, tokens, layout.wanted):
                at = rows.start - layout.first
                wanted = targets[at : at + rows.n]
                found.append(work.take(rows, wanted, reference.rows(index, at, wanted) if reference else None))
            for nll, shifts in found:
                state.tally.add(nll)
                nlls.append(nll)
                if shifts is not None and state.distance is not None:
                    if not shifts.is_sound(session.n_vocab):
                        raise _damaged_reference(index)
                    state.distance.add(nll, shifts)
                    kls.append(shifts.kl)
            if not math.isfinite(state.tally.nll):
                raise _no_numbers(index)
            state.n_done = index + 1
            if writer is not None:
                writer.flush()
            checkpoint.keep(np.concatenate(nlls), np.concatenate(kls) if kls else None)
            if report is not None:
                report(state)
    quantiles = {}
    if state.distance is not None:
        values = np.sort(checkpoint.tokens()[:, 1])
        quantiles = {name: quantile(values, fraction) for name, fraction in _QUANTILES.items()}
    return Result(layout, state.tally, state.distance, quantiles, time.perf_counter() - begin, work.seconds)


def _damaged_reference(index: int) -> MoelocalError:
    return MoelocalError(
        f"The reference is damaged: its probabilities in chunk {index + 1:,} do not add up to 1.",
        "Get its file again. Saved logits: moelocal eval MODEL --text FILE --save-logits FILE",
    )


def _no_numbers(index: int) -> MoelocalError:
    return MoelocalError(
        f"The model gives no usable numbers in chunk {index + 1:,} (NaN or infinity).",
        "The file may be damaged: get it again. Or leave --kv-type and --experts-used out.",
    )


class _Work:
    """The arithmetic on one batch's rows, spread over threads: numpy does not hold the interpreter. `seconds` of it."""

    def __init__(self, pool: ThreadPoolExecutor, writer: LogitsWriter | None = None) -> None:
        self._pool, self._writer = pool, writer
        self.seconds = 0.0

    def take(self, rows: Rows, targets: list[int], base: Saved | None) -> tuple[Doubles, Shifts | None]:
        """Scores, compares and writes one batch's rows."""
        import numpy as np

        start = time.perf_counter()
        logits, wanted = _view(rows), np.array(targets, dtype=np.int32)
        parts = list(blocks(rows.n, logits.shape[1]))

        def one(part: slice) -> tuple[Doubles, Shifts | None, Words | None]:
            scores = score(logits[part], wanted[part])
            shifts = None if base is None else compare(logits[part], scores, base.part(part), wanted[part])
            return scores.nll, shifts, encode(logits[part], scores.log_sum) if self._writer else None

        nll: list[Doubles] = []
        shifts: list[Shifts] = []
        for part_nll, part_shifts, words in self._pool.map(one, parts):
            nll.append(part_nll)
            if part_shifts is not None:
                shifts.append(part_shifts)
            if self._writer is not None and words is not None:
                self._writer.write(words)
        whole = Shifts(*(np.concatenate(column) for column in zip(*shifts, strict=True))) if shifts else None
        self.seconds += time.perf_counter() - start
        return np.concatenate(nll), whole


def _view(rows: Rows) -> Floats:
    """llama.cpp's own buffer as float32[n, n_vocab]."""
    import numpy as np

    return np.frombuffer(rows.floats, np.float32).reshape(rows.n, -1)


class LiveReference:
    """A reference model that runs beside the other one, batch by batch; its rows are what its file would hold."""

    def __init__(self, session: Session, text: Text) -> None:
        self._session, self._text = session, text
        self._bos = session.begin
        self._batches: Iterator[Rows] = iter(())

    def rows(self, chunk: int, start: int, targets: list[int]) -> Saved:
        """See `Reference`. Both models must compute batches of the same size.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            MoelocalError: llama.cpp failed.
        """
        import numpy as np

        layout, n = self._text.layout, len(targets)
        if start == 0:
            tokens = layout.chunk(self._text.tokens, chunk, self._bos)
            self._batches = chunk_logits(self._session, tokens, layout.wanted)
        batch = next(self._batches)
        assert (batch.start, batch.n) == (layout.first + start, n)
        logits = _view(batch)
        chosen: Tokens = np.array(targets, dtype=np.int32)
        parts = blocks(n, logits.shape[1])
        with ThreadPoolExecutor(self._session.plan.threads) as pool:
            saved = list(pool.map(lambda part: _saved(logits[part], chosen[part]), parts))
        if start + n == layout.n_rows:
            next(self._batches, None)  # lets go of Ctrl-C
        words, nll = zip(*saved, strict=True)
        return Saved(np.concatenate(words), np.concatenate(nll))


def _saved(logits: Floats, targets: Tokens) -> tuple[Words, Floats]:
    """What a file would hold of some rows."""
    import numpy as np

    scores = score(logits, targets)
    return encode(logits, scores.log_sum), scores.nll.astype(np.float32)
