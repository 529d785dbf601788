"""What commands that make a model share: where it goes, and what is said when it is there."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from pathlib import Path

_ENDINGS = (signal.SIGTERM, signal.SIGHUP) if sys.platform != "win32" else (signal.SIGTERM,)


def end_tidily() -> None:
    """From here on a window that is closed, or a request to end, first removes what is half made: gigabytes of it must
    not be left behind."""
    for signum in _ENDINGS:
        signal.signal(signum, lambda number, _: sys.exit(128 + number))


def base_name(reference: str, path: Path) -> str:
    """What a model is called without its quantization: of its file, or of its reference where that has no name (a blob
    of Ollama's)."""
    from moelocal.model.quants import quant_in_name
    from moelocal.model.stored import stem_of

    name = path.name if path.name.lower().endswith(".gguf") else reference.replace("/", "-").replace(":", "-") + ".gguf"
    stem = stem_of(name)
    quant = quant_in_name(name)
    short = re.sub(rf"[-._]?(?:{re.escape(quant)}|fp16|fp32)$", "", stem, flags=re.IGNORECASE) if quant else stem
    return short or stem


def destination(typed: str | None, name: str) -> Path:
    """The file to make: a path as typed, in a folder as typed, or of a name as typed (or else `name`) among the models
    made here.

    Raises:
        BadRequest: no file can have this name.
    """
    from moelocal.build.output import made_here
    from moelocal.paths import user_path

    if typed is None:
        return made_here(name)
    path = user_path(typed)
    if path.is_dir() or typed.endswith(("/", os.sep)):
        return path / f"{name}.gguf"
    if typed.lower().endswith(".gguf") or path.name != typed:
        return path
    return made_here(typed)


def usable_as(path: Path) -> str:
    """A MODEL that leads to a file made here, quoted for a shell: its name if it lies among them, else the path."""
    from moelocal.model.store import made_folder
    from moelocal.model.stored import stem_of

    is_named = path.parent == made_folder() and path.name.endswith(".gguf")
    return shlex.quote(stem_of(path.name) if is_named else str(path))
