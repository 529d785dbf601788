"""What `moelocal tune` found best, kept for each model file and machine: the planner takes it from here."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from moelocal.errors import BadRequest
from moelocal.model.kv import KVType
from moelocal.paths import tuned_file
from moelocal.plan.request import PlanRequest

_VERSION = 1
_MAX_BYTES = 1 << 16
_MOST = 1 << 16  # of any count
_COUNTS = ("threads", "threads_batch", "n_ubatch", "experts_on_cpu")
_SWITCHES = ("repack", "flash_attn")
_NO_LONGER_THAN_A_LOAD = ("repack",)  # a single answer does not pay for it


def keep_tuned(path: Path, machine: str, fields: dict[str, Any], gain: float, when: str) -> None:
    """Keeps fields of a PlanRequest for a model file on a machine, in place of what was kept for both.

    Raises:
        OSError: the folder cannot be written.
    """
    kept = {name: entry for name, entry in _stored(path).items() if name != machine}
    kept[machine] = {"fields": fields, "gain": round(gain, 4), "when": when}
    file = tuned_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".tuned-", dir=file.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as out:
            json.dump({"version": _VERSION, "model": _identity(path), "machines": kept}, out)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def forget_tuned(path: Path) -> bool:
    """Removes what was kept for a model. Returns whether there was anything."""
    try:
        tuned_file(path).unlink()
    except OSError:
        return False
    return True


def with_tuned(request: PlanRequest, path: Path, machine: str) -> PlanRequest:
    """A request whose open fields are what tuning found. What depends on memory only where nothing about it is asked
    for; repacking not for a single answer."""
    with suppress(OSError, BadRequest, ValueError, KeyError, TypeError, AttributeError):
        stored = _stored(path)[machine]["fields"]
        found = {
            name: value for name, value in stored.items() if getattr(request, name) is None and _is_sane(name, value)
        }
        if request.gpu_bytes or request.n_ctx or request.cpu_only:
            found.pop("experts_on_cpu", None)
        if request.one_shot:
            for name in _NO_LONGER_THAN_A_LOAD:
                found.pop(name, None)
        if found:
            return replace(request, tuned=tuple(found), **found)
    return request


def _is_sane(name: str, value: Any) -> bool:
    if name in _COUNTS:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST
    return isinstance(value, bool) if name in _SWITCHES else name == "kv_type" and value in get_args(KVType)


def _stored(path: Path) -> dict[str, Any]:
    """What is kept for a model file by machine; empty if it is damaged, or of another file."""
    try:
        with tuned_file(path).open("rb") as file:
            document = json.loads(file.read(_MAX_BYTES))
        if [document["version"], document["model"]] == [_VERSION, _identity(path)]:
            machines = document["machines"]
            return machines if isinstance(machines, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {}


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
