"""Which experts a model was seen to use: kept on disk by what its routers are, for pruning and residency.

The identity is made from the routers' weights, which quantizing leaves as they are: so a profile that was measured on
one quantization serves the others, wherever their files lie, and a pruned or retrained model has none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.facts import ModelFacts
from moelocal.model.header import GGUFHeader
from moelocal.paths import user_home

_VERSION = 2
_STEPS = 32  # of the shares of experts that RAM may hold
_SAMPLE_BYTES = 16 << 10  # of each router
_MOST_BYTES = 16 << 20
_MOST_LAYERS, _MOST_EXPERTS = 1024, 4096


@dataclass(frozen=True, slots=True)
class LayerUsage:
    """One MoE layer: how often each expert was chosen, the weights its outputs got added up, and `reuse`: how many
    choices came again after d other experts (the last entry: for the first time); `ranked`: how many while d others
    ranked higher in moelocal's cache; see `measure.experts`."""

    layer: int
    counts: tuple[int, ...]
    mass: tuple[float, ...]
    reuse: tuple[int, ...]
    ranked: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertUsage:
    """What one run of `moelocal experts` saw. `text` names what was run."""

    model: str
    text: str
    n_tokens: int
    n_experts_used: int
    layers: tuple[LayerUsage, ...]


def cache_hits(distances: Sequence[int], n_slots: int) -> float:
    """Share of the choices that a cache of `n_slots` experts has, by their places in its order."""
    total = sum(distances)
    return sum(distances[: min(n_slots, len(distances) - 1)]) / total if total else 0.0


def hit_rates(usage: ExpertUsage) -> tuple[float, ...]:
    """Share of the choices that are in RAM when it holds i of `len - 1` equal parts of the experts; mean of the
    layers."""
    return tuple(
        sum(cache_hits(one.ranked, round(step / _STEPS * len(one.counts))) for one in usage.layers) / len(usage.layers)
        for step in range(_STEPS + 1)
    )


def informed(facts: ModelFacts, header: GGUFHeader, paths: Sequence[Path]) -> ModelFacts:
    """The facts with the hit rates of the model's profile, if it has one: what a plan for too little RAM needs."""
    try:
        usage = load_usage(identity(header, paths))
    except MoelocalError:
        return facts
    return facts if usage is None else replace(facts, hit_rates=hit_rates(usage))


def identity(header: GGUFHeader, paths: Sequence[Path]) -> str:
    """What the model's routers are, in 16 hexadecimal digits.

    Args:
        paths: the checkpoint's files, in the order of its shards.

    Raises:
        MoelocalError: a file cannot be read, or there are no routers.
    """
    routers = [tensor for tensor in header.tensors if tensor.name.endswith(".ffn_gate_inp.weight")]
    if not routers:
        raise MoelocalError("This model has no routers.", "Choose a MoE model: moelocal list shows which are.")
    digest = hashlib.sha256(str(header.metadata.get("general.architecture")).encode())
    try:
        for tensor in sorted(routers):
            with paths[tensor.shard].open("rb") as file:
                file.seek(tensor.offset)
                digest.update(f"{tensor.name}{tensor.shape}{tensor.ggml_type}".encode())
                digest.update(file.read(min(_SAMPLE_BYTES, tensor.n_bytes)))
    except OSError as error:
        raise MoelocalError(f"{error.filename} cannot be read: {error.strerror}.", "Check the file.") from error
    return digest.hexdigest()[:16]


def profile_file(which: str) -> Path:
    """Where the profile of the model with this identity is kept."""
    return user_home() / "profiles" / f"{which}.json"


def save_usage(which: str, usage: ExpertUsage) -> bool:
    """Keeps a profile in place of the one before. False where the folder cannot be written."""
    data = {
        "version": _VERSION,
        "model": usage.model,
        "text": usage.text,
        "n_tokens": usage.n_tokens,
        "n_experts_used": usage.n_experts_used,
        "layers": [
            {
                "layer": one.layer,
                "counts": one.counts,
                "mass": [float(f"{mass:.6g}") for mass in one.mass],
                "reuse": one.reuse,
                "ranked": one.ranked,
            }
            for one in usage.layers
        ],
    }
    with suppress(OSError, BadRequest):
        file = profile_file(which)
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
            os.replace(beside, file)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        return True
    return False


def load_usage(which: str) -> ExpertUsage | None:
    """The profile of a model; None where there is none, or only a damaged or foreign file."""
    with suppress(OSError, BadRequest, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        with profile_file(which).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        stored = json.loads(data) if len(data) <= _MOST_BYTES else {}
        if stored["version"] == _VERSION:
            return _decoded(stored)
    return None


def _decoded(stored: Any) -> ExpertUsage:
    """The inverse of `save_usage`; what is not as written there raises one of the errors that `load_usage` knows."""
    if not 0 < len(stored["layers"]) <= _MOST_LAYERS:
        raise ValueError("layers")
    layers = tuple(_layer(one) for one in stored["layers"])
    return ExpertUsage(
        _text(stored["model"]),
        _text(stored["text"]),
        _number(stored["n_tokens"]),
        _number(stored["n_experts_used"]),
        layers,
    )


def _layer(stored: Any) -> LayerUsage:
    counts, mass, reuse, ranked = stored["counts"], stored["mass"], stored["reuse"], stored["ranked"]
    n = len(counts)
    if not 0 < n <= _MOST_EXPERTS or len(mass) not in (0, n) or not len(reuse) == len(ranked) == n + 1:
        raise ValueError("experts")
    if any(isinstance(one, bool) or not math.isfinite(one) for one in mass):
        raise ValueError("mass")
    return LayerUsage(
        _number(stored["layer"]),
        tuple(_number(one) for one in counts),
        tuple(float(one) for one in mass),
        tuple(_number(one) for one in reuse),
        tuple(_number(one) for one in ranked),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(value)
    return value
