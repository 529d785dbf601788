"""The arithmetic of evaluation, against slow and plain versions of llama-perplexity's loops, and by hand."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from moelocal.measure.divergence import Distance, Saved, compare, encode, quantile, row_words
from moelocal.measure.perplexity import Layout, Tally, blocks, exp, mean_and_error, score

F32 = np.float32


def random_logits(n_rows: int, n_vocab: int, seed: int, spread: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n_rows, n_vocab)) * spread).astype(F32)


def plain_words(row: np.ndarray) -> tuple[float, float, list[int]]:
    """One row as llama-perplexity saves it: log_softmax() with uint16_t."""
    top, least = row.max(), row.min()
    least = max(least, F32(top - F32(16)))
    log_sum = F32(math.log(sum(math.exp(float(x) - float(top)) for x in row)))
    scale = F32((top - least) / F32(65535))
    if not scale:
        return 0.0, float(F32(least - top - log_sum)), [0] * len(row)
    inverse = F32(1) / scale
    steps = [round(float(inverse * F32(x - least))) if x > least else 0 for x in row]
    return float(scale), float(F32(F32(least - top) - log_sum)), steps


def plain_kl(row: np.ndarray, words: tuple[float, float, list[int]]) -> float:
    """Its kl_divergence(), in double precision."""
    scale, least, steps = words
    log_norm = math.log(sum(math.exp(float(x)) for x in row))
    total = 0.0
    for x, step in zip(row, steps, strict=True):
        base = scale * step + least
        if base > -16:
            total += math.exp(base) * (base - float(x) + log_norm)
    return total


@pytest.mark.parametrize(("n_vocab", "spread"), [(3, 1.0), (64, 4.0), (257, 12.0), (1001, 0.1)])
def test_rows_as_llama_perplexity_works_them_out(n_vocab: int, spread: float) -> None:
    base, other = random_logits(7, n_vocab, 1, spread), random_logits(7, n_vocab, 2, spread)
    targets = np.random.default_rng(3).integers(0, n_vocab, 7).astype(np.int32)
    mine, theirs = score(other, targets), score(base, targets)
    words = encode(base, theirs.log_sum)
    assert words.shape == (7, row_words(n_vocab)) and words.dtype == np.uint16
    found = compare(other, mine, Saved(words, None), targets)
    for i in range(7):
        plain = plain_words(base[i])
        scale, least = struct.unpack("<ff", words[i, :4].tobytes())
        assert (scale, least) == pytest.approx(plain[:2], rel=1e-5)
        assert np.abs(words[i, 4 : 4 + n_vocab].astype(int) - plain[2]).max() <= 1
        log_norm = math.log(sum(math.exp(float(x)) for x in other[i]))
        assert mine.nll[i] == pytest.approx(log_norm - float(other[i, targets[i]]), abs=1e-5)
        assert found.kl[i] == pytest.approx(plain_kl(other[i], plain), rel=1e-3, abs=1e-4)
        assert found.nll_base[i] == pytest.approx(-(scale * words[i, 4 + targets[i]] + least), abs=1e-5)
        assert found.is_same[i] == (base[i].argmax() == other[i].argmax())
    assert not words[:, 4 + n_vocab :].any()


def test_a_model_against_itself_loses_nothing() -> None:
    logits = random_logits(50, 500, 5)
    targets = np.zeros(50, dtype=np.int32)
    scores = score(logits, targets)
    found = compare(logits, scores, Saved(encode(logits, scores.log_sum), scores.nll.astype(F32)), targets)
    assert np.abs(found.kl).max() < 1e-3 and found.is_same.all() and np.abs(found.p_diff).max() < 1e-6


def test_equal_and_extreme_logits() -> None:
    flat = np.full((2, 4), 3.0, dtype=F32)
    targets = np.array([0, 3], dtype=np.int32)
    scores = score(flat, targets)
    assert scores.nll == pytest.approx([math.log(4)] * 2) and list(scores.best) == [0, 0]
    words = encode(flat, scores.log_sum)
    assert not words[:, 4:].any()
    assert compare(flat, scores, Saved(words, None), targets).kl == pytest.approx([0, 0], abs=1e-6)
    steep = np.array([[1000.0, 0.0, -1000.0]], dtype=F32)
    scores = score(steep, np.array([1], dtype=np.int32))
    assert scores.nll == pytest.approx([1000])
    found = compare(steep, scores, Saved(encode(steep, scores.log_sum), None), np.array([1], dtype=np.int32))
    assert found.nll_base == pytest.approx([16]) and found.is_clipped[0]
    assert np.isnan(score(np.array([[math.nan, 1.0]], dtype=F32), np.array([1], dtype=np.int32)).nll).all()


def test_exact_probabilities_count_where_they_are_known() -> None:
    steep = np.array([[100.0, 0.0]], dtype=F32)
    targets = np.array([1], dtype=np.int32)
    scores = score(steep, targets)
    found = compare(steep, scores, Saved(encode(steep, scores.log_sum), np.array([100], F32)), targets)
    assert found.nll_base == pytest.approx([100]) and not found.is_clipped[0]


def test_blocks_cover_every_row_once() -> None:
    for n_rows, n_vocab in ((1, 10), (255, 2048), (256, 151_936), (7, 1 << 20)):
        rows = [i for part in blocks(n_rows, n_vocab) for i in range(n_rows)[part]]
        assert rows == list(range(n_rows))


def test_a_text_is_cut_as_llama_perplexity_cuts_it() -> None:
    layout = Layout(n_ctx=8, n_chunks=2)
    tokens = list(range(100, 120))
    assert (layout.first, layout.n_rows, layout.n_scored, list(layout.wanted)) == (4, 3, 6, [4, 5, 6])
    assert layout.chunk(tokens, 1, bos=1) == [1, *range(109, 116)]
    assert layout.chunk(tokens, 1, bos=None) == list(range(108, 116))
    assert layout.targets(tokens, 1) == [113, 114, 115]
    assert Layout(7, 1).n_rows == 3 and list(Layout(7, 1).wanted) == [3, 4, 5]


def test_sums_and_their_errors() -> None:
    tally = Tally()
    tally.add(np.array([1.0, 2.0]))
    tally.add(np.array([3.0]))
    assert tally.perplexity == pytest.approx(math.exp(2))
    assert tally.stderr == pytest.approx(math.exp(2) * math.sqrt((14 / 3 - 4) / 2))
    assert math.isnan(Tally().perplexity) and exp(1e9) == math.inf
    assert mean_and_error(3.0, 3.0, 3) == (1.0, 0.0)
    distance = Distance(count=100, n_same=90)
    assert distance.agreement == pytest.approx((0.9, math.sqrt(0.09 / 99)))


def test_the_ratio_knows_that_both_stumble_over_the_same_tokens() -> None:
    nll = np.random.default_rng(0).normal(3, 1, 4000)
    base = nll + np.random.default_rng(1).normal(0.1, 0.01, 4000)
    sums = Distance(4000, float(base.sum()), float((base**2).sum()), float((nll * base).sum()))
    ratio, error = sums.ratio(float(nll.sum()), float((nll**2).sum()))
    assert ratio == pytest.approx(math.exp(-0.1), rel=1e-3) and error < 3 * 0.01 / math.sqrt(4000)


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 1.0), (0.5, 2.5), (0.99, 3.97), (1.0, 4.0)])
def test_quantiles(fraction: float, value: float) -> None:
    assert quantile(np.array([1, 2, 3, 4], dtype=F32), fraction) == pytest.approx(value)
    assert quantile(np.array([7], dtype=F32), fraction) == 7
