"""A model of the hub brought to this disk: into the Hugging Face cache, where other tools find it too.

    paths = download(listing, model, watch)        # of all its files; the first is the one to run

`transfer.py` fetches each file to where the cache wants its content (blobs/CHECKSUM), and huggingface_hub then gives it
its name there: only when all files of the model are whole, so that nobody sees half of it. (Its own transfer starts
anew after an interruption.) A file that was cut into pieces is joined as it comes, in the folder of models made here,
since no program can read the pieces.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from moelocal.errors import BadGGUF, MoelocalError
from moelocal.model.cache import leftovers
from moelocal.model.client import hub_utils, patiently, prepare, translated
from moelocal.model.header import merge_shards, parse_header, split_of
from moelocal.model.hub import Contents, HubFile, HubModel, Listing
from moelocal.model.store import made_folder
from moelocal.model.transfer import Target, Transfer, bytes_here, unusable
from moelocal.units import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
_LOCK_S = 0.25


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is: bytes of each file (name, here, all), and of all together; `waiting`: for another
    process that fetches the same file."""

    files: tuple[tuple[str, int, int], ...]
    waiting: bool = False

    @property
    def n_done(self) -> int:
        """Bytes that are here."""
        return sum(done for _, done, _ in self.files)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, _, size in self.files)


Watch = Callable[[Progress], None]


def download(listing: Listing, model: HubModel, watch: Watch) -> tuple[Path, ...]:
    """Fetches what is missing of a model, and returns where its files are.

    Raises:
        HubError: the hub refuses, sends damaged bytes, or cannot be reached.
        MoelocalError: no room on the disk, or it cannot be written.
    """
    targets = targets_of(listing, model)
    _fetch_all(listing, targets, watch)
    with _writing(targets[0].path.parent):
        _check_set(listing, model, targets)
    if model.is_cut:
        return (targets[0].path,)
    return _name_all(listing, targets)


def download_files(contents: Contents, files: Sequence[HubFile], watch: Watch) -> tuple[Path, ...]:
    """Fetches what is missing of some files of a repository, and returns where they are.

    Raises:
        HubError: the hub refuses, sends damaged bytes, or cannot be reached.
        MoelocalError: no room on the disk, or it cannot be written.
    """
    targets = file_targets(contents, files)
    _fetch_all(contents, targets, watch)
    return _name_all(contents, targets)


def file_targets(listing: Listing | Contents, files: Sequence[HubFile]) -> list[Target]:
    """Where files go that stay as they are."""
    blobs = cache_folder(listing.repo) / "blobs"
    return [Target(blobs / file.digest, (file,)) for file in files]


def _name_all(listing: Listing | Contents, targets: list[Target]) -> tuple[Path, ...]:
    with translated(listing.repo), _writing(targets[0].path.parent):
        return tuple(_named(listing, target.files[0].path, target) for target in targets)


def _fetch_all(listing: Listing | Contents, targets: list[Target], watch: Watch) -> None:
    folder = targets[0].path.parent
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_room(targets)
    done = [bytes_here(target) for target in targets]
    names = [target.files[0].path.rpartition("/")[2] for target in targets]

    def report(index: int, n_done: int, waiting: bool = False) -> None:
        done[index] = n_done
        rows = zip(names, done, (target.n_bytes for target in targets), strict=True)
        watch(Progress(tuple(rows), waiting))

    for index, target in enumerate(targets):
        report(index, done[index])
        with translated(listing.repo), _writing(folder):
            _fetch(listing, target, lambda n_done, waiting=False, i=index: report(i, n_done, waiting))
        report(index, target.n_bytes)


def _check_set(listing: Listing, model: HubModel, targets: list[Target]) -> None:
    """Reads the headers of all files together: each was looked at by itself when it came.

    Raises:
        MoelocalError: llama.cpp could not load them. What nothing else names is removed.
    """
    paths = [target.path if model.is_cut else Path(target.files[0].path) for target in targets]
    headers = []
    try:
        for path, target in zip(paths, targets, strict=True):
            with target.path.open("rb") as stream:
                header = parse_header(stream, target.n_bytes, path.name)
            headers.append(replace(header, shards=(path.name,)))
        if split_of(paths[0].name, headers[0])[1] > 1:
            merge_shards(headers)
    except BadGGUF as error:
        unnamed = [target.path for target in targets] if model.is_cut else leftovers(cache_folder(listing.repo))
        for target in targets:
            if target.path in unnamed:
                target.path.unlink(missing_ok=True)
        raise unusable(error, len(targets)) from error


def targets_of(listing: Listing, model: HubModel) -> list[Target]:
    """Where the files of a model go."""
    if model.is_cut:
        owner, _, name = listing.repo.partition("/")
        label = model.label if model.label == model.quant else model.stem.rpartition("/")[2]
        return [Target(made_folder() / owner / f"{name}-{label}.gguf", model.files)]
    return file_targets(listing, model.files)


def cache_folder(repo: str) -> Path:
    """Where the Hugging Face cache keeps a repository."""
    prepare()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def is_here(listing: Listing, model: HubModel) -> bool:
    """Whether nothing is left to fetch."""
    return all(target.is_there for target in targets_of(listing, model))


def is_being_fetched(blob: Path) -> bool:
    """Whether some process holds the lock of a file of the cache that is not whole yet."""
    name = blob.name.removesuffix(".incomplete").removesuffix(".moelocal")
    for lock in (_blob_lock(blob.parent.parent, name), _joined_lock(blob.with_name(name))):
        try:
            if name != blob.name and lock.exists():
                with hub_utils().WeakFileLock(lock, timeout=_LOCK_S):
                    pass
        except TimeoutError:
            return True
    return False


def missing_bytes(targets: list[Target]) -> int:
    """What is still to come."""
    return sum(target.n_bytes - bytes_here(target) for target in targets)


def free_bytes(folder: Path) -> int | None:
    """Room on the disk where a folder is, or would be made; None: not known."""
    import shutil

    for place in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def check_room(targets: list[Target]) -> None:
    """Refuses a download that the disk has no room for.

    Raises:
        MoelocalError: with what is missing.
    """
    folder = targets[0].path.parent
    missing, free = missing_bytes(targets), free_bytes(folder)
    if free is not None and missing > free:
        raise MoelocalError(
            f"The disk has room for {format_bytes(free)}, and {format_bytes(missing)} are still to come.",
            "Free some (moelocal list shows what is here, moelocal rm removes it), or set "
            f"{_setting(folder)} to another disk.",
        )


def _setting(folder: Path) -> str:
    """The variable that says where a folder is."""
    return "MOELOCAL_HOME" if folder.is_relative_to(made_folder()) else "HF_HOME"


def _fetch(listing: Listing | Contents, target: Target, report: Callable[..., None]) -> None:
    """One file, unless it is there; while another process fetches it, this one waits and shows how far that is."""
    with _locked(_lock_path(listing, target), lambda: report(bytes_here(target), True)):
        if not target.is_there:
            Transfer(target, listing.repo, listing.commit).run(report)


def _lock_path(listing: Listing | Contents, target: Target) -> Path:
    """The lock of a file: huggingface_hub's own, so that its downloads and ours wait for each other."""
    if len(target.files) > 1:
        return _joined_lock(target.path)
    return _blob_lock(cache_folder(listing.repo), target.path.name)


def _joined_lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _blob_lock(folder: Path, digest: str) -> Path:
    return folder.parent / ".locks" / folder.name / f"{digest}.lock"


@contextmanager
def _locked(path: Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock; where the file system has none, goes on without: then at worst the work is done twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    has_waited = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hub_utils().WeakFileLock(path, timeout=_LOCK_S))
                break
            except TimeoutError:
                has_waited = True
                while_waiting()
        if has_waited:
            while_waiting()
        yield


def _named(listing: Listing | Contents, file: str, target: Target) -> Path:
    """Lets huggingface_hub name a file whose content is in the cache."""
    from huggingface_hub import hf_hub_download

    def name() -> str:
        return hf_hub_download(listing.repo, file, revision=listing.commit, library_name="moelocal")

    path = Path(patiently(name))
    if not path.is_symlink() and target.path.exists() and not target.path.samefile(path):
        target.path.unlink()  # where links are not possible, the cache holds the file itself, once
    newest = cache_folder(listing.repo) / "refs" / "main"
    newest.parent.mkdir(parents=True, exist_ok=True)
    newest.write_text(listing.commit, encoding="ascii")
    return path


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says in plain words when the disk is full or cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise MoelocalError(
                f"The disk is full: {folder} takes nothing more.",
                "Free some room, then pull again: it goes on where it stopped.",
            ) from error
        if error.errno == errno.ENOENT:
            raise MoelocalError(f"What was fetched vanished from {folder}.", "Pull again.") from error
        if error.errno in _READ_ONLY:
            raise MoelocalError(
                f"{folder} cannot be written: {os.strerror(error.errno or 0)}.",
                f"Set {_setting(folder)} to a folder of your own.",
            ) from error
        raise
