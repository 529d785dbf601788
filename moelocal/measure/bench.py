"""Prompt and generation speed, by llama-bench's definitions, so that figures compare.

    samples = measure(session, BenchTest(512, 0, 0), repetitions=5)

`pp512`: a prompt of 512 random tokens, computed at once. `tg128`: 128 tokens one after another, random ones, nothing
sampled. At a depth, so many tokens are in the cache before, outside of the clock. One run before the first that counts.

Source: llama.cpp 0c1e57098, tools/llama-bench/llama-bench.cpp, test_prompt and test_gen.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from moelocal.engine.session import Session
from moelocal.machine.throttle import Throttling
from moelocal.measure.others import BUSY_SHARE, OtherWork
from moelocal.measure.resources import Resources

_OUTLIER = 5.0  # times the typical distance from the median
_LEAST_OUTLIER = 0.05  # of the median: less is noise, however even the others are
_DRIFT = 0.08  # from the first to the last, each slower than the one before


class BenchTest(NamedTuple):
    """What is timed: `n_prompt` tokens at once, then `n_gen` one by one, with `n_depth` in the cache before."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp512, tg128, pp512+tg128, tg128 @ d4096."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen


@dataclass(frozen=True, slots=True)
class Samples:
    """Tokens per second of each repetition; the share of the processor that other programs took; what was too hot."""

    per_s: tuple[float, ...]
    peak_ram_bytes: int
    major_faults: int
    others_share: float = 0.0
    throttled: tuple[str, ...] = ()

    @property
    def median(self) -> float:
        """What is reported."""
        return median(self.per_s)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know to trust the figures; empty when nothing was odd."""
        found = []
        if self.others_share > BUSY_SHARE:
            found.append(f"other programs used {self.others_share:.0%} of the processor")
        if odd := outliers(self.per_s):
            worst = max((abs(self.per_s[i] / self.median - 1), self.per_s[i]) for i in odd)[1]
            way = "slower" if worst < self.median else "faster"
            found.append(f"{len(odd)} of {len(self.per_s)} runs off, by up to {abs(worst / self.median - 1):.0%} {way}")
        if is_falling(self.per_s):
            found.append(f"slower from run to run, {1 - self.per_s[-1] / self.per_s[0]:.0%} in all: heat?")
        if self.throttled:
            found.append(f"{' and '.join(self.throttled)} was held back by heat or power")
        if self.major_faults:
            pages = "1 page" if self.major_faults == 1 else f"{self.major_faults:,} pages"
            found.append(f"{pages} came from disk")
        return tuple(found)


def outliers(per_s: Sequence[float]) -> tuple[int, ...]:
    """Which samples lie far from the median: 5 times the median distance, and 5 % at least. Of fewer than four, none.

    Source: median absolute deviation; Leys et al., "Detecting outliers" (2013).
    """
    if len(per_s) < 4:
        return ()
    middle = median(per_s)
    usual = median(abs(value - middle) for value in per_s)
    limit = max(_OUTLIER * usual, _LEAST_OUTLIER * middle)
    return tuple(i for i, value in enumerate(per_s) if abs(value - middle) > limit)


def is_falling(per_s: Sequence[float]) -> bool:
    """Whether each sample is slower than the one before, by a lot in all: what heat does."""
    is_steady = all(after < before for before, after in itertools.pairwise(per_s))
    return len(per_s) >= 4 and is_steady and per_s[-1] < (1 - _DRIFT) * per_s[0]


def measure(
    session: Session,
    test: BenchTest,
    repetitions: int,
    on_run: Callable[[int], None] = lambda _: None,
    has_nvidia: bool = False,
) -> Samples:
    """Times one test. `on_run` is called with the number of runs done, the one that does not count included.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        MoelocalError: llama.cpp failed.
    """
    noise = random.Random(0)
    depth = _text(session, noise, test.n_depth)
    _run(session, noise, test._replace(n_gen=min(test.n_gen, 1)), depth)
    on_run(1)
    others, throttling, resources = OtherWork(), Throttling(has_nvidia=has_nvidia), Resources()
    per_s = []
    for i in range(repetitions):
        per_s.append(test.n_tokens / _run(session, noise, test, depth))
        on_run(i + 2)
    return Samples(tuple(per_s), resources.peak_bytes, resources.major_faults, others.share(), throttling.seen())


def _run(session: Session, noise: random.Random, test: BenchTest, depth: list[int]) -> float:
    """Seconds of one run."""
    n_kept = session.rewind(len(depth)) if session.cached[: len(depth)] == depth else session.rewind(0)
    session.evaluate(depth[n_kept:])
    prompt = _text(session, noise, test.n_prompt)
    answer = _text(session, noise, test.n_gen)
    start = time.perf_counter()
    session.evaluate(prompt)
    session.evaluate(answer, one_by_one=True)
    return time.perf_counter() - start


def _text(session: Session, noise: random.Random, n: int) -> list[int]:
    """Random tokens, the first one as the model wants it."""
    tokens = [noise.randrange(session.n_vocab) for _ in range(n)]
    if tokens and session.begin is not None:
        tokens[0] = session.begin
    return tokens
