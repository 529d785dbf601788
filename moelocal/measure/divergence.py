"""What a change to a model cost: its distribution of the next token against that of a reference, on the same text.

The reference's log-probabilities are those of llama-perplexity's saved logits: 16 bits each, over the 16 nats below the
likeliest token; what is below e^-16 counts as nothing. Of the text's own tokens the exact -ln p is taken where it is
known: less likely ones would make the reference look better than it is. KL divergence is sum p_ref (ln p_ref - ln p),
in nats: what the reference would lose if the model spoke for it. Quantiles are interpolated between neighbours.

Source: llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp: log_softmax() with uint16_t, kl_divergence().
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moelocal.measure.perplexity import Scores, exp, mean_and_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moelocal.measure.perplexity import Doubles, Floats, Tokens

    Words = NDArray[np.uint16]

RANGE_NATS = 16.0
HEAD_WORDS = 4  # float32 scale and float32 least log-probability, in front of a row
_STEPS = 65535
_LEAST_OFF = 0.01  # of a sum of probabilities: rounding to 16 bits takes a fiftieth of that


def row_words(n_vocab: int) -> int:
    """16-bit words of a saved row: its head, and one for each token, rounded up to an even number."""
    return 2 * ((n_vocab + 1) // 2) + HEAD_WORDS


def encode(logits: Floats, log_sum: Doubles) -> Words:
    """Rows of logits as saved log-probabilities: uint16[n, row_words]. `log_sum`: of each row, ln of sum e^logit."""
    import numpy as np

    n_rows, n_vocab = logits.shape
    words = np.zeros((n_rows, row_words(n_vocab)), dtype="<u2")
    top = logits.max(axis=1)
    least = np.maximum(logits.min(axis=1), top - np.float32(RANGE_NATS))
    scale = (top - least) / np.float32(_STEPS)
    head = words[:, :HEAD_WORDS].view("<f4")
    head[:, 0] = scale
    head[:, 1] = least - top - (log_sum - top).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    steps = logits - least[:, None]
    np.maximum(steps, 0, out=steps)
    steps *= inverse[:, None]
    np.rint(steps, out=steps)
    words[:, HEAD_WORDS : HEAD_WORDS + n_vocab] = steps
    return words


class Saved(NamedTuple):
    """The reference's rows: uint16[n, row_words], and -ln p of their targets: float32[n]; None: only the rows tell."""

    words: Words
    nll: Floats | None

    def part(self, rows: slice) -> Saved:
        """Some of the rows."""
        return Saved(self.words[rows], None if self.nll is None else self.nll[rows])


class Shifts(NamedTuple):
    """Of each row: KL divergence; -ln p of the target by the reference; its p by the model less that by the reference;
    whether both have the same likeliest token; whether the reference's p of the target is only known to be less; what
    the reference's p of all tokens add up to."""

    kl: Doubles
    nll_base: Doubles
    p_diff: Doubles
    is_same: NDArray[np.bool_]
    is_clipped: NDArray[np.bool_]
    mass: Doubles

    def is_sound(self, n_vocab: int) -> bool:
        """Whether the reference's rows can be a model's: they add up to 1, but for what is too rare to count."""
        too_rare = n_vocab * math.exp(-RANGE_NATS)
        return bool(((self.mass >= 1 - too_rare - _LEAST_OFF) & (self.mass <= 1 + _LEAST_OFF)).all())


def compare(logits: Floats, scores: Scores, reference: Saved, targets: Tokens) -> Shifts:
    """Compares rows of logits: float32[n, n_vocab] and their scores with the reference's saved rows."""
    import numpy as np

    n_rows, n_vocab = logits.shape
    words, at = reference.words, np.arange(n_rows)
    head = np.ascontiguousarray(words[:, :HEAD_WORDS]).view("<f4")
    saved = words[:, HEAD_WORDS : HEAD_WORDS + n_vocab]
    base = saved.astype(np.float32)
    base *= head[:, :1]
    base += head[:, 1:]
    nll_base = (-base[at, targets] if reference.nll is None else reference.nll).astype(np.float64)
    is_clipped = (saved[at, targets] == 0) & (head[:, 0] > 0) & (reference.nll is None)
    difference = base - logits
    difference += scores.log_sum.astype(np.float32)[:, None]
    counts = base > np.float32(-RANGE_NATS)
    np.exp(base, out=base)
    base *= counts
    mass = base.sum(axis=1, dtype=np.float64)
    base *= difference
    kl = base.sum(axis=1, dtype=np.float64)
    p_diff = np.exp(-scores.nll) - np.exp(-nll_base)
    return Shifts(kl, nll_base, p_diff, saved.argmax(axis=1) == scores.best, is_clipped, mass)


@dataclass(slots=True)
class Distance:
    """Sums over the scored tokens; the divergences themselves are kept by the caller, for their quantiles."""

    count: int = 0
    nll_base: float = 0.0
    nll_base2: float = 0.0
    nll_nll_base: float = 0.0
    kl: float = 0.0
    kl2: float = 0.0
    p_diff2: float = 0.0
    p_diff4: float = 0.0
    n_same: int = 0
    n_clipped: int = 0

    def add(self, nll: Doubles, shifts: Shifts) -> None:
        """Takes what was found of some tokens."""
        self.count += len(nll)
        self.nll_base += float(shifts.nll_base.sum())
        self.nll_base2 += float((shifts.nll_base**2).sum())
        self.nll_nll_base += float((nll * shifts.nll_base).sum())
        self.kl += float(shifts.kl.sum())
        self.kl2 += float((shifts.kl**2).sum())
        self.p_diff2 += float((shifts.p_diff**2).sum())
        self.p_diff4 += float((shifts.p_diff**4).sum())
        self.n_same += int(shifts.is_same.sum())
        self.n_clipped += int(shifts.is_clipped.sum())

    @property
    def kl_mean(self) -> tuple[float, float]:
        """Mean KL divergence in nats, and its standard error."""
        return mean_and_error(self.kl, self.kl2, self.count)

    @property
    def agreement(self) -> tuple[float, float]:
        """Share of tokens where both models' first choice is the same, and its standard error."""
        share = self.n_same / self.count
        return share, math.sqrt(share * (1 - share) / (self.count - 1)) if self.count > 1 else 0.0

    @property
    def p_diff_rms(self) -> float:
        """Root mean square of the change in the probability of the text's own token."""
        return math.sqrt(self.p_diff2 / self.count)

    @property
    def base_perplexity(self) -> tuple[float, float]:
        """The reference's perplexity, and its standard error."""
        mean, error = mean_and_error(self.nll_base, self.nll_base2, self.count)
        return exp(mean), exp(mean) * error

    def ratio(self, nll: float, nll2: float) -> tuple[float, float]:
        """Perplexity of the model (its sums of -ln p and of the square) by the reference's, and the standard error:
        much smaller than that of either, since both stumble over the same tokens."""
        mean, error = mean_and_error(nll, nll2, self.count)
        base, base_error = mean_and_error(self.nll_base, self.nll_base2, self.count)
        covariance = (self.nll_nll_base / self.count - mean * base) / max(1, self.count - 1)
        ratio = exp(mean - base)
        return ratio, ratio * math.sqrt(max(0.0, error**2 + base_error**2 - 2 * covariance))


def quantile(values: Floats, fraction: float) -> float:
    """A quantile of sorted values, in float32 as llama-perplexity has it. `fraction`: 0 to 1."""
    import numpy as np

    place = np.float32(fraction) * np.float32(len(values) - 1)
    low = int(place)
    share = np.float32(place - np.float32(low))
    high = values[min(low + 1, len(values) - 1)]
    return float((np.float32(1) - share) * values[low] + share * high)
