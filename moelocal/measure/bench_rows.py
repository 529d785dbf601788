"""What a benchmark found: one row for each test and setting; kept, and set beside what was found before. Pure, but for
the file of rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from moelocal.engine.history import append, lines_backwards
from moelocal.measure.bench import BenchTest, Samples
from moelocal.paths import user_home

_VERSION = 1
_HALF_BYTES, _MAX_BYTES = 512 << 10, 4 << 20
_LEAST_NOISE = 0.02  # of the median: two runs of the same program differ by that


@dataclass(frozen=True, slots=True)
class Setting:
    """How the model ran. `threads_batch` are those for prompts."""

    threads: int
    threads_batch: int
    n_ubatch: int
    repack: bool
    kv_type: str
    expert_layers: dict[str, list[int]]

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for equal settings."""
        layers = tuple((name, len(its)) for name, its in self.expert_layers.items() if its)
        return self.threads, self.threads_batch, self.n_ubatch, self.repack, self.kv_type, layers


@dataclass(frozen=True, slots=True)
class Row:
    """One test with one setting. Speeds in tokens per second."""

    model: str
    test: BenchTest
    setting: Setting
    samples: Samples
    predicted_per_s: float
    roofline_per_s: float

    def as_json(self) -> dict[str, Any]:
        """The row as `bench --json` prints it."""
        per_s = self.samples.per_s
        return {
            "model": self.model,
            "test": self.test.name,
            "n_prompt": self.test.n_prompt,
            "n_gen": self.test.n_gen,
            "n_depth": self.test.n_depth,
            "tokens_per_s": {
                "median": round(median(per_s), 3),
                "min": round(min(per_s), 3),
                "max": round(max(per_s), 3),
                "samples": [round(value, 3) for value in per_s],
            },
            "threads": self.setting.threads,
            "threads_batch": self.setting.threads_batch,
            "n_ubatch": self.setting.n_ubatch,
            "repack": self.setting.repack,
            "kv_type": self.setting.kv_type,
            "expert_layers": self.setting.expert_layers,
            "predicted_per_s": round(self.predicted_per_s, 3),
            "roofline_per_s": round(self.roofline_per_s, 3),
            "peak_ram_bytes": self.samples.peak_ram_bytes,
            "major_faults": self.samples.major_faults,
            "notes": list(self.samples.notes),
        }


class Earlier(NamedTuple):
    """The same test with the same setting, measured before: when (ISO 8601), with which llama.cpp, and its samples."""

    when: str
    engine: str
    per_s: tuple[float, ...]


class Change(NamedTuple):
    """A row against an earlier one: the share by which it is faster, and how much of that is noise."""

    share: float
    noise: float
    earlier: Earlier

    @property
    def verdict(self) -> str:
        """slower, faster or same: beyond the noise."""
        if abs(self.share) <= self.noise:
            return "same"
        return "faster" if self.share > 0 else "slower"


def compare(per_s: Sequence[float], earlier: Earlier) -> Change:
    """How a measurement differs from an earlier one. The noise: half of the wider range of samples, 2 % at least."""
    before, now = median(earlier.per_s), median(per_s)
    ranges = ((max(its) - min(its)) / 2 / median(its) for its in (per_s, earlier.per_s))
    return Change(now / before - 1, max(_LEAST_NOISE, *ranges), earlier)


class Kept(NamedTuple):
    """The rows that were kept on this machine: `machine` is its identity without llama.cpp's version, `engine` that
    version, `file` the model's size in bytes and its name."""

    machine: str
    engine: str

    def keep(self, rows: Iterable[tuple[Row, tuple[int, str]]], when: str) -> None:
        """Adds rows, each with its file; a folder that cannot be written is no failure."""
        lines = [
            {
                "version": _VERSION,
                "when": when,
                "machine": self.machine,
                "engine": self.engine,
                "file": file,
                "key": _key(row),
                "per_s": row.samples.per_s,
                "row": row.as_json(),
            }
            for row, file in rows
        ]
        data = "".join("\n" + json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        with suppress(OSError):
            append(_path(), data, _HALF_BYTES)

    def latest(self, row: Row, file: tuple[int, str]) -> Earlier | None:
        """The last time that this was measured here."""
        key = json.loads(json.dumps(_key(row)))
        for line in lines_backwards(_path(), _MAX_BYTES):
            with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                stored = json.loads(line)
                same = [stored["version"], stored["machine"], stored["file"], stored["key"]]
                if same == [_VERSION, self.machine, list(file), key]:
                    per_s = tuple(float(value) for value in stored["per_s"])
                    if per_s and min(per_s) > 0:
                        return Earlier(str(stored["when"]), str(stored["engine"]), per_s)
        return None


def _key(row: Row) -> list[Any]:
    return [row.test.name, *row.setting.key]


def _path() -> Path:
    return user_home() / "bench.jsonl"
