"""Where a file made here goes, and how it gets there: whole or not at all.

with writing(path, need_bytes=4 << 30) as part:
    ...                                     # write to `part`
# `path` is there, whole and on the disk; or, after an error or Ctrl-C, nothing is
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from moelocal.errors import BadRequest, MoelocalError
from moelocal.model.download import free_bytes
from moelocal.model.store import made_folder
from moelocal.units import format_bytes

_PART, _WORK = ".part", ".work"


def made_here(name: str) -> Path:
    """The file of a model made here: usable by this name at once."""
    return made_folder() / f"{name}.gguf"


@contextlib.contextmanager
def writing(path: Path, need_bytes: int = 0, replace: bool = False) -> Iterator[Path]:
    """A file beside `path` to write to; it gets that name when all went well, else it is removed.

    What killed processes left of the same file is removed first.

    Args:
        need_bytes: room that must be free on its disk.
        replace: whether a file that is there may be replaced.

    Raises:
        BadRequest: `path` is a folder, or exists and may not be replaced.
        MoelocalError: no room, or the disk failed.
    """
    check_free(path, replace)
    part = _beside(path, _PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        check_room(path, need_bytes)
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        raise _translated(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def workspace(path: Path, need_bytes: int = 0) -> Iterator[Path]:
    """A hidden folder beside `path` for what is on the way to it, removed at the end in any case.

    Args:
        need_bytes: room that must be free on its disk.

    Raises:
        MoelocalError: no room, or the disk failed.
    """
    folder = _beside(path, _WORK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        check_room(path, need_bytes)
        folder.mkdir()
        yield folder
    except OSError as error:
        raise _translated(error, path) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(parts: list[Path], folder: Path) -> list[Path]:
    """Moves whole files into a folder of the same disk, under their own names; the first one, by which a split model is
    opened, last.

    Raises:
        OSError: the disk failed.
    """
    for part in parts:
        _sync(part)
    for part in reversed(parts):
        os.replace(part, folder / part.name)
    _sync(folder)
    return [folder / part.name for part in parts]


def check_free(path: Path, replace: bool) -> None:
    """Looks whether a file may be made.

    Raises:
        BadRequest: `path` is a folder, or exists and may not be replaced.
        MoelocalError: nothing can be written there.
    """
    if path.is_dir():
        raise BadRequest(f"{path} is a folder.", f"Name a file in it: {path / 'model.gguf'}")
    if path.exists() and not replace:
        raise BadRequest(f"{path} exists already.", "Name another one, or allow it to be replaced: --force")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise _unwritable(path, f"{folder} is {'read-only' if folder.is_dir() else 'no folder'}")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{suffix}")


def _remove_leftovers(path: Path) -> None:
    import psutil

    ours = re.compile(re.escape(f".{path.name}.") + rf"(\d+)(?:{_PART}|{_WORK})")
    for other in path.parent.iterdir():
        if (match := ours.fullmatch(other.name)) and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)


def check_room(path: Path, need_bytes: int) -> None:
    """Looks whether there is room for a file.

    Raises:
        MoelocalError: there is not.
    """
    free = free_bytes(path.parent)
    if free is not None and need_bytes > free:
        raise MoelocalError(
            f"{path.name} takes {format_bytes(need_bytes)}, and the disk of {path.parent} has room for "
            f"{format_bytes(free)}.",
            "Free some (moelocal list shows what is here, moelocal rm removes it), or name a file on another disk.",
        )


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    with contextlib.suppress(PermissionError, IsADirectoryError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
                os.fsync(handle)
        finally:
            os.close(handle)


def _translated(error: OSError, path: Path) -> MoelocalError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MoelocalError(
            f"The disk is full: {path.name} could not be written.",
            "Free some (moelocal list shows what is here, moelocal rm removes it), or name a file on another disk.",
        )
    return _unwritable(path, error.strerror or str(error))


def _unwritable(path: Path, why: str) -> MoelocalError:
    hint = "Name a file elsewhere, or choose another folder for all that is made here: export MOELOCAL_HOME=FOLDER"
    return MoelocalError(f"{path} cannot be written: {why}.", hint)
