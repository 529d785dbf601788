"""One model run on one device: seconds per decoded token, per batch of a prompt, and to load.

Of many decodes the median counts, of several readings the mean, since what is predicted is what people will see: on a
busy machine nothing of it is kept (`others.py`).
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from moelocal.engine.allocation import logged_buffers
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session, load
from moelocal.measure.probe_model import N_VOCAB, ProbeModel
from moelocal.model.header import read_header
from moelocal.plan.cost import Placement
from moelocal.plan.planner import Plan

SHORT_PROMPT, LONG_PROMPT = PROMPTS = 128, 512  # the long one only where the short one is quick
_N_CTX = 1024
_DEPTH_STEP = 512  # tokens
_DEEP_CTX = 5 * _DEPTH_STEP
_DECODES, _FEW_DECODES = 64, 6
_DECODE_LIMIT_S = 0.3  # then a few decodes are enough
_SLOW_S = 0.4  # of the short batch: then the long one is left out
_LEAST_MORE = 0.05  # of a deep reading is attention's, whatever the noise says
_FIRST_TOKEN = 259  # before it: control tokens and bytes


@dataclass(frozen=True, slots=True)
class Where:
    """What holds the layers and the experts of a measured model, and how."""

    layers: str
    experts: str
    threads: int
    repack: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds. `prefill_s` by the number of tokens in the batch; `repacked_bytes` were rearranged at load."""

    decode_s: float
    prefill_s: dict[int, float] = field(default_factory=dict)
    load_s: float = 0.0
    repacked_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds as a line over the number of layers."""

    fixed_s: float
    layer_s: float

    def at(self, n_layers: int) -> float:
        """Seconds of so many layers."""
        return self.fixed_s + n_layers * self.layer_s


def mean(readings: Sequence[Reading]) -> Reading:
    """The mean of several readings of one model; of batches that all of them have."""
    batches = set[int].intersection(*(set(reading.prefill_s) for reading in readings))
    return Reading(
        fmean(reading.decode_s for reading in readings),
        {n: fmean(reading.prefill_s[n] for reading in readings) for n in batches},
        fmean(reading.load_s for reading in readings),
        readings[0].repacked_bytes,
    )


class Attention(NamedTuple):
    """Seconds of a query against one position of the cache, in all layers: one query at a time, and a prompt's."""

    decode_s: float
    prefill_s: float

    @classmethod
    def mean(cls, readings: Sequence[Attention]) -> Attention:
        """The mean of several readings."""
        return cls(*map(fmean, zip(*readings, strict=True)))


def read_speed(path: Path, model: ProbeModel, where: Where, prompts: tuple[int, ...] = PROMPTS) -> Reading:
    """Loads a model and times it.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        LoadFailed, OutOfMemory: see `engine.session.load`.
    """
    plan = _plan(model, where, _N_CTX)
    with load([path], read_header(path), plan) as session:
        repacked = sum(buffer.n_bytes for buffer in logged_buffers() if "REPACK" in buffer.name)
        if where.repack and not repacked:
            return Reading(0.0, {}, session.load_s, 0)  # llama.cpp has no other layout for this type here
        noise = random.Random(0)
        _run(session, noise, 8, 2)  # brings weights and threads in
        decode_s = median(_run(session, noise, 8, _DECODES)[1])
        prefill_s: dict[int, float] = {}
        for n in prompts:
            if max(prefill_s.values(), default=0.0) < _SLOW_S:
                prefill_s[n] = _run(session, noise, n, 1)[0]
        return Reading(decode_s, prefill_s, session.load_s, repacked)


def read_attention(path: Path, model: ProbeModel, where: Where) -> Attention:
    """What attention takes: from how much longer a deep cache takes than a shallow one.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        LoadFailed, OutOfMemory: see `engine.session.load`.
    """
    step, noise = _DEPTH_STEP, random.Random(0)
    text = [noise.randrange(_FIRST_TOKEN, N_VOCAB) for _ in range(4 * step)]
    with load([path], read_header(path), _plan(model, where, _DEEP_CTX)) as session:
        _run_text(session, noise, text[:8], 2)  # brings weights and threads in
        first_s, shallow = _run_text(session, noise, text[:step], _DECODES)
        for end in (2 * step, 3 * step):
            _run_text(session, noise, text[:end], 1)
        last_s, deep = _run_text(session, noise, text, _DECODES)
    decode_s = max(_LEAST_MORE * median(deep), median(deep) - median(shallow))
    return Attention(decode_s / (3 * step), max(_LEAST_MORE * last_s, last_s - first_s) / (3 * step * step))


def _plan(model: ProbeModel, where: Where, n_ctx: int) -> Plan:
    placement = None
    if where.layers != "CPU":
        placement = Placement((where.layers,) * model.n_layers, (where.experts,) * model.n_layers, where.layers)
    return Plan(
        n_ctx=n_ctx,
        kv_type="f16",
        n_ubatch=LONG_PROMPT,
        threads=where.threads,
        n_gpu_layers=0,
        repack=where.repack,
        load_mode="mmap",
        placement=placement,
    )


def _run(session: Session, noise: random.Random, n_tokens: int, n_decodes: int) -> tuple[float, list[float]]:
    """Seconds of a prompt of random tokens, and of each token decoded after it."""
    tokens = [noise.randrange(_FIRST_TOKEN, N_VOCAB) for _ in range(n_tokens)]
    tokens[0] = _FIRST_TOKEN + (session.cached[0] + 1 - _FIRST_TOKEN) % 100 if session.cached else tokens[0]
    return _run_text(session, noise, tokens, n_decodes)


def _run_text(session: Session, noise: random.Random, tokens: list[int], n_decodes: int) -> tuple[float, list[float]]:
    """Seconds of what of a prompt is not in the cache, and of each token decoded after it."""
    sampling = Sampling(  # almost uniform: every token chooses other experts
        n_decodes + 1, temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=noise.randrange(1 << 30), ignore_eos=True
    )
    at: list[float] = []
    start = time.perf_counter()
    for _ in session.stream(tokens, sampling):
        at.append(time.perf_counter())
        if len(at) > _FEW_DECODES and at[-1] - at[0] > _DECODE_LIMIT_S:
            break
    return at[0] - start, [after - before for before, after in itertools.pairwise(at)]
