"""An evaluation under way, kept after each chunk: an interrupted one goes on and gives the same result to the bit.

In `user_home()/eval/`: KEY.json holds the sums, KEY.tokens two float32 for every token: -ln p, and its divergence
(quantiles need all of them), KEY.logits the reference's saved logits where both models do not fit at once. The key
stands for everything that the result depends on. All of it is removed when the evaluation is complete, or has lain for
two weeks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelocal.errors import MoelocalError
from moelocal.measure.divergence import Distance
from moelocal.measure.perplexity import Tally
from moelocal.paths import cannot_keep, user_home

if TYPE_CHECKING:
    from moelocal.measure.perplexity import Doubles, Floats

_STALE_S = 14 * 24 * 3600
_TOKEN_BYTES = 8


@dataclass(slots=True)
class State:
    """Chunks that are done, and the sums over their scored tokens."""

    n_done: int = 0
    tally: Tally = field(default_factory=Tally)
    distance: Distance | None = None


def key_of(facts: Mapping[str, Any]) -> str:
    """A name for everything that a result depends on."""
    import hashlib

    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def file_identity(path: Path) -> list[object]:
    """What tells a file from another one, or from itself after a change."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def eval_folder() -> Path:
    """Where evaluations under way are kept."""
    return user_home() / "eval"


class Checkpoint:
    """Keeps the state of one evaluation; a context manager that holds it against a second process."""

    def __init__(self, key: str, compares: bool) -> None:
        """Finds what an earlier process left of it; `state` is where to go on.

        Raises:
            MoelocalError: the folder cannot be written, or another process is at this very evaluation.
        """
        folder = eval_folder()
        self._json, self._values = folder / f"{key}.json", folder / f"{key}.tokens"
        self._compares = compares
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            self._values.touch()
            self._file = self._values.open("r+b")
        except OSError as error:
            raise cannot_keep("Progress", error) from error
        self._lock()
        self.state = self._read() or self.restart()

    def restart(self) -> State:
        """Forgets what was kept."""
        self._json.unlink(missing_ok=True)
        self.state = State(distance=Distance() if self._compares else None)
        return self.state

    def _read(self) -> State | None:
        try:
            kept = json.loads(self._json.read_text())
            distance = Distance(**kept["distance"]) if self._compares else None
            state = State(int(kept["n_done"]), Tally(**kept["tally"]), distance)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        has_values = os.fstat(self._file.fileno()).st_size >= _TOKEN_BYTES * state.tally.count
        return state if has_values else None

    def keep(self, nll: Doubles, kl: Doubles | None) -> None:
        """Keeps the state after a chunk, with -ln p and the divergences of its tokens.

        Raises:
            MoelocalError: the disk is full.
        """
        import numpy as np

        pairs = np.stack((nll, np.zeros_like(nll) if kl is None else kl), axis=1)
        try:
            self._file.seek(_TOKEN_BYTES * (self.state.tally.count - len(nll)))
            self._file.write(pairs.astype("<f4").tobytes())
            self._file.flush()
            new = self._json.with_suffix(".new")
            new.write_text(json.dumps(asdict(self.state)))
            os.replace(new, self._json)
        except OSError as error:
            raise cannot_keep("Progress", error) from error

    def tokens(self) -> Floats:
        """-ln p and divergence of every token: float32[count, 2]."""
        import numpy as np

        self._file.seek(0)
        return np.fromfile(self._file, "<f4", 2 * self.state.tally.count).reshape(-1, 2)

    def remove(self) -> None:
        """The evaluation is complete."""
        for path in (self._json, self._values):
            with suppress(OSError):
                path.unlink()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows; there an open file cannot be replaced anyway
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise MoelocalError(
                "This very evaluation is already running in another process.", "Wait until it is done, or end it."
            ) from error
        except OSError:
            return  # a file system without locks

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what a full disk did not take was told by `keep`
            self._file.close()


def _sweep(folder: Path) -> None:
    """Removes what nobody went on with."""
    before = time.time() - _STALE_S
    for path in folder.iterdir():
        with suppress(OSError):
            if path.stat().st_mtime < before:
                path.unlink()
