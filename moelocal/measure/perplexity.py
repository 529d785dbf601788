"""Perplexity by the definition of llama-perplexity, so that published numbers compare.

A text becomes chunks of `n_ctx` tokens, each computed from an empty memory. The first token of a chunk is replaced by
the model's begin token, if it wants one. Only the second half is scored, so that every scored token has some text
before it: the logits of position p predict the token at p + 1, for p from n_ctx // 2 to n_ctx - 2. Perplexity is
exp(mean of -ln p(token)).

Source: llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp: perplexity(), log_softmax().
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Tokens = NDArray[np.int32]

_BLOCK_FLOATS = 1 << 17  # rows taken at once: 0.5 MiB of logits and its temporaries stay in a core's cache


class Layout(NamedTuple):
    """How a text is cut: chunks of `n_ctx` tokens, `n_chunks` of them."""

    n_ctx: int
    n_chunks: int

    @property
    def first(self) -> int:
        """The first position whose logits are scored."""
        return self.n_ctx // 2

    @property
    def n_rows(self) -> int:
        """Scored positions of a chunk."""
        return self.n_ctx - 1 - self.first

    @property
    def n_scored(self) -> int:
        """Scored positions in all."""
        return self.n_rows * self.n_chunks

    @property
    def wanted(self) -> range:
        """The scored positions."""
        return range(self.first, self.n_ctx - 1)

    def chunk(self, tokens: Sequence[int], index: int, bos: int | None) -> list[int]:
        """The tokens to compute for a chunk."""
        ids = list(tokens[index * self.n_ctx : (index + 1) * self.n_ctx])
        return ids if bos is None else [bos, *ids[1:]]

    def targets(self, tokens: Sequence[int], index: int) -> list[int]:
        """The tokens that the scored positions of a chunk predict."""
        start = index * self.n_ctx + self.first + 1
        return list(tokens[start : start + self.n_rows])


@dataclass(slots=True)
class Tally:
    """What is kept of the scored tokens: their number, and the sums of -ln p and of its square."""

    count: int = 0
    nll: float = 0.0
    nll2: float = 0.0

    def add(self, nll: Doubles) -> None:
        """Takes the -ln p of some tokens."""
        self.count += len(nll)
        self.nll += float(nll.sum())
        self.nll2 += float((nll * nll).sum())

    @property
    def perplexity(self) -> float:
        """exp(mean of -ln p); infinite for a model that gave a token no chance at all, NaN without tokens."""
        return exp(self.nll / self.count) if self.count else math.nan

    @property
    def stderr(self) -> float:
        """Its standard error."""
        return self.perplexity * mean_and_error(self.nll, self.nll2, self.count)[1] if self.count else math.nan


def exp(x: float) -> float:
    """e to the x; infinite instead of an error."""
    return math.exp(x) if x < 709 else x if math.isnan(x) else math.inf


def mean_and_error(total: float, total2: float, count: int) -> tuple[float, float]:
    """A mean and its standard error from the sums of values and of their squares; 0 where rounding made it negative."""
    mean = total / count
    variance = total2 / count - mean * mean
    return mean, math.sqrt(variance / (count - 1)) if variance > 0 and count > 1 else 0.0


class Scores(NamedTuple):
    """Of each row of logits: -ln p of its target, ln of the sum of exp(logit), and the likeliest token."""

    nll: Doubles
    log_sum: Doubles
    best: Any


def score(logits: Floats, targets: Tokens) -> Scores:
    """Scores logits: float32[n, n_vocab] against targets: int32[n]. A row that holds NaN scores NaN."""
    import numpy as np

    at = np.arange(len(logits))
    best = logits.argmax(axis=1)
    top = logits[at, best]
    shifted = logits - top[:, None]
    chosen = shifted[at, targets].astype(np.float64)
    np.exp(shifted, out=shifted)
    log_sum = np.log(shifted.sum(axis=1, dtype=np.float64))
    return Scores(log_sum - chosen, log_sum + top, best)


def blocks(n_rows: int, n_vocab: int) -> Iterator[slice]:
    """Slices of rows that are worked on together."""
    step = max(1, _BLOCK_FLOATS // n_vocab)
    return (slice(at, min(n_rows, at + step)) for at in range(0, n_rows, step))
