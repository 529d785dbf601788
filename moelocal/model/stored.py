"""Models among files: which files of a folder are models, and which belong together.

    whole, halves = models_among(["Q8_0/big-00001-of-00002.gguf", "Q8_0/big-00002-of-00002.gguf", "mmproj-F16.gguf"])

Names only; nothing is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from moelocal.model.quants import quant_in_name

Owner = Literal["moelocal", "hub", "ollama", "lmstudio"]
OWNERS: dict[Owner, str] = {
    "moelocal": "moelocal",
    "hub": "the Hugging Face cache",
    "ollama": "Ollama",
    "lmstudio": "LM Studio",
}

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_PROJECTOR = re.compile(r"(?<![a-z])mm-?proj(?![a-z])")
_MAX_SHARDS = 1000
_MAX_FILES = 20_000  # of one folder; whoever has more has something else there


@dataclass(frozen=True, slots=True)
class Stored:
    """One model on this disk. `name` is a MODEL that leads to it; `files` are all its shards, in order; `quant` is what
    the names tell, '' if nothing. `repo` and `file`: its repository on the hub, and its (first) file there."""

    name: str
    files: tuple[Path, ...]
    owner: Owner
    quant: str = ""
    repo: str = ""
    file: str = ""

    @property
    def path(self) -> Path:
        """The file to give to llama.cpp."""
        return self.files[0]


class Half(NamedTuple):
    """A split model of which shards are missing: their names."""

    file: str
    missing: tuple[str, ...]


def is_model(file: str) -> bool:
    """Whether a file may be a model, by its name: projectors of vision models and importance matrices are none."""
    name = file.rpartition("/")[2].lower()
    if not name.endswith(".gguf") or _PROJECTOR.search(name):
        return False
    return "imatrix" not in name or bool(quant_in_name(name))


def models_among(files: Iterable[str]) -> tuple[list[tuple[str, ...]], list[Half]]:
    """Models among the files of one folder (names with `/`), each with all of its files; and incomplete ones."""
    whole: list[tuple[str, ...]] = []
    splits: dict[tuple[str, int], set[str]] = {}
    for file in sorted(filter(is_model, files)):
        match = _SHARD.fullmatch(file)
        if match and 1 < int(match["count"]) <= _MAX_SHARDS:
            splits.setdefault((match["stem"], int(match["count"])), set()).add(file)
        elif not match or int(match["count"]) == 1:
            whole.append((file,))
    halves = []
    for (stem, count), held in splits.items():
        wanted = tuple(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count))
        missing = tuple(file for file in wanted if file not in held)
        if missing:
            halves.append(Half(wanted[0], missing))
        else:
            whole.append(wanted)
    return sorted(whole), halves


def stem_of(file: str) -> str:
    """A model's file without its ending and the number of its shard."""
    match = _SHARD.fullmatch(file)
    return match["stem"] if match else file[: -len(".gguf")]


def quant_of(file: str) -> str:
    """The quantization that a file in a repository tells by its name, else by its folders' names."""
    return quant_in_name(file.rpartition("/")[2]) or quant_in_name(file)


def files_below(folder: Path, depth: int = 4) -> list[str]:
    """Files in a folder and in those below it, relative, with `/`. Links count when they lead to a file; what cannot be
    read is not there."""
    found: list[str] = []
    for name in _walk(str(folder), "", depth):
        found.append(name)
        if len(found) >= _MAX_FILES:
            break
    return found


def all_files(folder: Path) -> list[str]:
    """The same without a limit, and in hidden folders too: all that may lead to a blob of the cache. Links to folders
    are not followed, which the cache does not make."""
    found: list[str] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        prefix = Path(place).relative_to(folder)
        found += [(prefix / name).as_posix() for name in sorted(names) if os.path.isfile(os.path.join(place, name))]
    return found


def _walk(folder: str, prefix: str, depth: int) -> Iterator[str]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_file():
                yield prefix + entry.name
            elif depth > 1 and entry.is_dir() and not entry.name.startswith(".") and not _leads_up(entry):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", depth - 1)
        except OSError:
            continue


def _leads_up(entry: os.DirEntry[str]) -> bool:
    """Whether this is a link to a folder that it is in."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    return os.path.commonpath([target, os.path.realpath(os.path.dirname(entry.path))]) == target


def called(models: list[Stored], base: str, quant: str = "") -> list[str]:
    """A name for each model of one repository: with the quantization where that is enough, else the file."""
    quants = [model.quant for model in models]
    return [
        f"{base}:{model.quant}" if model.quant and quants.count(model.quant) == 1 else f"{model.repo}/{model.file}"
        for model in models
    ]
