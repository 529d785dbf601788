"""Models in the Hugging Face cache, which the user's other tools share: read from its folders, without the library.

    models--OWNER--REPO/refs/main                   the commit of the newest version
                       /snapshots/COMMIT/FILE ->    ../../blobs/HASH, or the file itself where links are not possible
                       /blobs/HASH                  HASH.incomplete while it is downloaded

Source: huggingface_hub 1.0, docs/source/en/guides/manage-cache.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moelocal.model.reference import is_repo
from moelocal.model.stored import Half, Stored, all_files, called, files_below, models_among, quant_of
from moelocal.paths import hub_folder

_PREFIX = "models--"
PARTIAL = ".moelocal.incomplete"  # the end of a file's name while we fetch it


@dataclass(frozen=True, slots=True)
class Shelf:
    """What the cache holds of one repository: models of its newest version here, and of older ones what that lacks."""

    repo: str
    folder: Path
    models: tuple[Stored, ...]
    halves: tuple[Half, ...] = ()


def hub() -> Path | None:
    """The folder of the cache; None if nobody knows where it would be."""
    try:
        return hub_folder()
    except RuntimeError:  # no home folder
        return None


def shelves(names: dict[str, str]) -> Iterator[Shelf]:
    """All repositories of the cache that hold models, or parts of some. `names`: what to call repositories, if not by
    their own names."""
    for repo, folder in sorted(_folders()):
        shelf = read_shelf(repo, folder, names.get(repo.lower(), repo))
        if shelf.models or shelf.halves or _has_begun(repo, folder):
            yield shelf


def _has_begun(repo: str, folder: Path) -> bool:
    """Whether a download of a model has left something: one of ours, or of another tool's that looks like a model's."""
    left = leftovers(folder)
    return any(path.name.endswith(PARTIAL) for path in left) or ("gguf" in repo.lower() and bool(left))


def shelf_of(repo: str, name: str = "") -> Shelf | None:
    """What is here of one repository, in upper or lower case."""
    place = hub()
    if place is None:
        return None
    folder = place / (_PREFIX + repo.replace("/", "--"))
    if os.path.isdir(folder):  # Path.is_dir() raises where access is denied
        return read_shelf(repo, folder, name or repo)
    for other, folder in _folders():
        if other.lower() == repo.lower():
            return read_shelf(other, folder, name or other)
    return None


def _folders() -> Iterator[tuple[str, Path]]:
    place = hub()
    try:
        names = os.listdir(place) if place else []
    except OSError:
        return
    for name in names:
        repo = name.removeprefix(_PREFIX).replace("--", "/", 1)
        if place and name.startswith(_PREFIX) and is_repo(repo):
            yield repo, place / name


def read_shelf(repo: str, folder: Path, name: str) -> Shelf:
    """The models in one repository's folder."""
    seen: dict[str, Stored] = {}
    halves: dict[str, Half] = {}
    for snapshot in snapshots(folder):
        whole, parts = models_among(all_files(snapshot))
        for files in whole:
            paths = tuple(snapshot / file for file in files)
            seen.setdefault(files[0], Stored("", paths, "hub", quant_of(files[0]), repo, files[0]))
        for half in parts:
            halves.setdefault(half.file, half)
    models = [seen[file] for file in sorted(seen)]
    named = [replace(model, name=one) for model, one in zip(models, called(models, name), strict=True)]
    return Shelf(repo, folder, tuple(named), tuple(half for file, half in halves.items() if file not in seen))


def snapshots(folder: Path) -> list[Path]:
    """A repository's versions here: that of refs/main first, then the newest."""
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        main = ""
    try:
        with os.scandir(folder / "snapshots") as listing:
            found = [(one.name != main, -one.stat().st_mtime, one.path) for one in listing if one.is_dir()]
    except OSError:
        return []
    return [Path(path) for _, _, path in sorted(found)]


def leftovers(folder: Path) -> list[Path]:
    """Blobs in a repository's folder that no version names: downloads that have not ended, or not all of a model."""
    named = set()
    for snapshot in snapshots(folder):
        named |= {os.path.realpath(snapshot / file) for file in all_files(snapshot)}
    return [
        folder / "blobs" / file
        for file in files_below(folder / "blobs", depth=1)
        if os.path.realpath(folder / "blobs" / file) not in named
    ]


def unfinished(folder: Path) -> int:
    """Bytes on the disk that leftovers take."""
    total = 0
    for path in leftovers(folder):
        try:
            total += allocated(path.stat())
        except OSError:
            continue
    return total


def allocated(status: os.stat_result) -> int:
    """Bytes that a file takes on the disk: one that is being written may have gaps."""
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(status.st_size, blocks * 512)
