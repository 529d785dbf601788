"""Models removed from the disk: what that would free, then the removal. Other tools' models are never touched.

In the Hugging Face cache a model is links in every version that has it, and blobs: a blob goes when no link that stays
leads to it, and counts when no other name on the disk (a hard link) keeps it.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.cache import Shelf, allocated, leftovers, snapshots
from moelocal.model.stored import Stored, all_files, files_below, stem_of


@dataclass(frozen=True, slots=True)
class Removal:
    """What removing one model takes: links and files by name, the files behind links, and the bytes that are free
    afterwards. `shared_bytes` stay: something else has them too."""

    name: str
    entries: tuple[Path, ...]
    blobs: tuple[Path, ...]
    freed_bytes: int
    shared_bytes: int
    top: Path


def plan_removal(model: Stored) -> Removal:
    """What would go, and what that frees.

    Raises:
        BadRequest: the model is another tool's.
    """
    if model.owner == "ollama":
        raise BadRequest(f"{model.name} is Ollama's, so it is left alone.", f"To remove it: ollama rm {model.name}")
    if model.owner == "lmstudio":
        folder = model.path.parent
        hint = f"In LM Studio: My Models, then Delete. Its files are in {folder}"
        raise BadRequest(f"{model.name} is LM Studio's, so it is left alone.", hint)
    if model.owner == "hub":
        return _from_cache(model)
    top = model.path.parents[len(Path(model.file).parts) - 1]
    freed, shared = _freed([path for path in model.files if not path.is_symlink()], model.files)
    return Removal(model.name, model.files, (), freed, shared, top)


def _from_cache(model: Stored) -> Removal:
    """All versions of the model's files go."""
    folder = model.path.parents[len(Path(model.file).parts) + 1]
    prefix = model.file.rpartition("/")[0]
    names = {f"{prefix}/{file.name}" if prefix else file.name for file in model.files}
    gone, blobs = _named_and_blobs(folder, names.__contains__)
    behind = dict.fromkeys(path.resolve() for path in gone)
    plain = tuple(path for path in gone if not path.is_symlink())
    freed, shared = _freed((*blobs, *plain), behind)
    return Removal(model.name, tuple(gone), blobs, freed, shared, folder)


def _named_and_blobs(folder: Path, is_going: Callable[[str], bool]) -> tuple[list[Path], tuple[Path, ...]]:
    """Files of all versions of a repository in the cache that are going, by name, and the blobs behind them to which
    nothing leads then."""
    gone: list[Path] = []
    kept: list[Path] = []
    for snapshot in snapshots(folder):
        for name in all_files(snapshot):
            (gone if is_going(name) else kept).append(snapshot / name)
    inside = (folder / "blobs").resolve()
    still = {path.resolve() for path in kept}
    behind = dict.fromkeys(path.resolve() for path in gone if path.is_symlink())
    return gone, tuple(blob for blob in behind if blob not in still and blob.parent == inside)


def plan_begun(repo: str, begun: list[Path], top: Path) -> Removal | None:
    """What would go of a model whose pieces were being joined here; None: there is nothing."""
    freed, shared = _freed(begun, begun)
    return Removal(f"what is here of {repo}", (), tuple(begun), freed, shared, top) if begun else None


def plan_leftovers(shelf: Shelf) -> Removal | None:
    """What would go of a repository that is here only in part: all that is no whole model; None: there is nothing."""
    stems = {stem_of(half.file) for half in shelf.halves}
    entries, behind = _named_and_blobs(
        shelf.folder, lambda file: file.lower().endswith(".gguf") and stem_of(file) in stems
    )
    blobs = (*leftovers(shelf.folder), *behind)
    if not entries and not blobs:
        return None
    going = (*blobs, *(path for path in entries if not path.is_symlink()))
    freed, shared = _freed(going, going)
    return Removal(f"what is here of {shelf.repo}", tuple(entries), blobs, freed, shared, shelf.folder)


def _freed(going: Iterable[Path], all_of_it: Iterable[Path]) -> tuple[int, int]:
    """Bytes on the disk that are free once files are gone, and those of the model that are not."""
    names: Counter[tuple[int, int]] = Counter()
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for is_going, paths in ((False, all_of_it), (True, going)):
        for path in dict.fromkeys(paths):
            status = path.stat()
            key = status.st_dev, status.st_ino
            sizes[key] = allocated(status), status.st_nlink
            names[key] += is_going
    freed = sum(n_bytes for key, (n_bytes, n_links) in sizes.items() if names[key] >= n_links)
    return freed, sum(n_bytes for n_bytes, _ in sizes.values()) - freed


def remove(removal: Removal) -> None:
    """Removes it: the first shard's name goes first, so that nothing ever takes the rest for a model.

    Raises:
        MoelocalError: the disk does not allow it.
    """
    path = removal.top
    try:
        for path in sorted(removal.entries):
            path.unlink(missing_ok=True)
        for path in removal.blobs:
            path.unlink(missing_ok=True)
    except OSError as error:
        hint = "If another user downloaded it, that user must remove it; a read-only disk must be mounted writable."
        raise MoelocalError(f"{path} cannot be removed: {error.strerror}.", hint) from error
    for path in (*removal.entries, *removal.blobs):
        _prune(path.parent, removal.top)
    if removal.top.name.startswith("models--"):
        _tidy(removal.top)


def _tidy(folder: Path) -> None:
    """Leaves a repository's folder as the cache's other users expect it: no name for a version that is gone, and no
    folder at all without any version or blob."""
    commits = {snapshot.name for snapshot in snapshots(folder)}
    try:
        for name in files_below(folder / "refs"):
            ref = folder / "refs" / name
            if ref.read_text(encoding="utf-8", errors="replace").strip() not in commits:
                ref.unlink()
        if not commits and not files_below(folder / "blobs"):
            shutil.rmtree(folder)
    except OSError:
        pass  # the model is gone; what is left is a few bytes


def _prune(folder: Path, top: Path) -> None:
    """Removes folders that have become empty, up to `top`, which stays."""
    while folder != top and top in folder.parents:
        try:
            os.rmdir(folder)
        except OSError:
            return
        folder = folder.parent
