"""Measured speeds of this machine: stored, loaded, defaults where nothing was measured.

Filled by `measure/probe.py` with llama.cpp's own kernels, read by `plan/cost.py`. Kept in `MOELOCAL_HOME/speeds.json`
under an identity of hardware and engine, so that a new graphics card or another build of llama.cpp starts afresh.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from moelocal.paths import user_home

_VERSION = 4
_KEPT = 8  # identities; the oldest go
_REPACKED = "+repack"
_MAX_BYTES = 4 << 20


UNLIMITED = 1e15  # per second: costs nothing


class TypeSpeed(NamedTuple):
    """How fast one device multiplies with weights of one type, dense or by expert.

    `decode_bytes_per_s`: bytes of weights read per second with one token, all threads. `prefill_weights_per_s`: weights
    times tokens per second in a batch of a prompt, beside what it takes to make the weights ready, once for the batch:
    `batch_bytes_per_s`.
    """

    decode_bytes_per_s: float
    prefill_weights_per_s: float
    batch_bytes_per_s: float = UNLIMITED


class DeviceSpeeds(NamedTuple):
    """One device. Keys of `dense` and `expert` are (ggml type name, repacked); seconds that a layer and a token cost
    beside the weights; multiplications of attention per second, one query at a time or a prompt's; values of a prompt's
    activations (tokens times the model's width) that a layer passes on per second, beside weights and attention;
    `measured` is False for defaults; bytes of the KV cache that attention reads per second."""

    dense: dict[tuple[str, bool], TypeSpeed]
    expert: dict[tuple[str, bool], TypeSpeed]
    layer_s: float
    token_s: float
    decode_macs_per_s: float = 1e13
    prefill_macs_per_s: float = 1e13
    prefill_values_per_s: float = UNLIMITED
    measured: bool = False
    cache_bytes_per_s: float = UNLIMITED

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """The fastest that any type of weights is read with one token; 0 where nothing is known."""
        return max((speed.decode_bytes_per_s for speed in self.dense.values()), default=0.0)


@dataclass(frozen=True, slots=True)
class Speeds:
    """All that measuring taught about this machine. `hop_s`: seconds to hand a token's activations to another device;
    `copy_bytes_per_s`: host memory to a GPU; `load_bytes_per_s`, `repack_bytes_per_s`: at load, from the page cache."""

    devices: dict[str, DeviceSpeeds] = field(default_factory=dict)
    hop_s: float = 50e-6
    copy_bytes_per_s: float = 12e9
    disk_bytes_per_s: float = 1.5e9
    load_bytes_per_s: float = 8e9
    repack_bytes_per_s: float = 0.6e9


def load_speeds(identity: str) -> Speeds | None:
    """What was measured under this identity; None if nothing was, or the file is damaged or of another version."""
    try:
        return _decoded(_stored()[identity])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def store_speeds(identity: str, speeds: Speeds) -> None:
    """Keeps what was measured, in place of what was measured before under the same identity.

    Raises:
        OSError: the folder cannot be written.
    """
    _store(identity, _encoded(speeds))


def skip_speeds(identity: str) -> None:
    """Remembers that this machine was not to be measured; without a word if that cannot be kept."""
    with suppress(OSError):
        _store(identity, {})


def is_known(identity: str) -> bool:
    """Whether the machine was measured, or was not to be."""
    return identity in _stored()


def _store(identity: str, entry: dict[str, Any]) -> None:
    import tempfile

    machines = {key: value for key, value in _stored().items() if key != identity}
    for oldest in list(machines)[: max(0, len(machines) - _KEPT + 1)]:
        del machines[oldest]
    machines[identity] = entry
    text = json.dumps({"version": _VERSION, "machines": machines}, indent=1, allow_nan=False)
    path = speeds_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".speeds-", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def speeds_file() -> Path:
    """Where speeds are kept."""
    return user_home() / "speeds.json"


def _stored() -> dict[str, Any]:
    """Everything in the file by identity; empty when it is missing, damaged or of another version."""
    try:
        with speeds_file().open("rb") as file:
            document = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        return {}
    machines = document.get("machines")
    return machines if isinstance(machines, dict) else {}


def _encoded(speeds: Speeds) -> dict[str, Any]:
    flat = {part.name: getattr(speeds, part.name) for part in fields(Speeds) if part.name != "devices"}
    return {**flat, "devices": {name: _encoded_device(device) for name, device in speeds.devices.items()}}


def _encoded_device(device: DeviceSpeeds) -> dict[str, Any]:
    def table(speeds: dict[tuple[str, bool], TypeSpeed]) -> dict[str, list[float]]:
        return {kind + _REPACKED * repacked: list(speed) for (kind, repacked), speed in speeds.items()}

    return {
        "dense": table(device.dense),
        "expert": table(device.expert),
        "layer_s": device.layer_s,
        "token_s": device.token_s,
        "decode_macs_per_s": device.decode_macs_per_s,
        "prefill_macs_per_s": device.prefill_macs_per_s,
        "prefill_values_per_s": device.prefill_values_per_s,
        "measured": device.measured,
        "cache_bytes_per_s": device.cache_bytes_per_s,
    }


def _decoded(stored: dict[str, Any]) -> Speeds:
    """The inverse of `_encoded`; whatever is not as written there raises one of the errors that `load_speeds` knows."""
    flat = {part.name: _amount(stored[part.name]) for part in fields(Speeds) if part.name != "devices"}
    return Speeds(devices={name: _decoded_device(device) for name, device in stored["devices"].items()}, **flat)


def _decoded_device(stored: dict[str, Any]) -> DeviceSpeeds:
    def table(speeds: dict[str, Any]) -> dict[tuple[str, bool], TypeSpeed]:
        return {
            (key.removesuffix(_REPACKED), key.endswith(_REPACKED)): TypeSpeed(*map(_amount, amounts))
            for key, amounts in speeds.items()
        }

    return DeviceSpeeds(
        dense=table(stored["dense"]),
        expert=table(stored["expert"]),
        layer_s=_amount(stored["layer_s"], zero=True),
        token_s=_amount(stored["token_s"], zero=True),
        decode_macs_per_s=_amount(stored["decode_macs_per_s"]),
        prefill_macs_per_s=_amount(stored["prefill_macs_per_s"]),
        prefill_values_per_s=_amount(stored["prefill_values_per_s"]),
        measured=stored["measured"] is True,
        cache_bytes_per_s=_amount(stored["cache_bytes_per_s"]),
    )


def _amount(value: Any, zero: bool = False) -> float:
    """A positive, finite number; 0 too, where that makes sense."""
    amount = float(value)
    if isinstance(value, (bool, str)) or not math.isfinite(amount) or amount < 0 or (amount == 0 and not zero):
        raise ValueError(value)
    return amount
