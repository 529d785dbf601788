"""Where moelocal keeps what belongs to this user: profiles, history, conversations, models made here; and paths as
people type them."""

import errno
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from moelocal.errors import BadRequest, MoelocalError


def user_path(text: str) -> Path:
    """A path as typed; ~ and ~name are home folders.

    Raises:
        BadRequest: no file can have this name, or that home folder is unknown.
    """
    if "\0" in text:
        raise BadRequest(f"{text!r} cannot be a path: it contains a NUL character.", "Check what was typed or pasted.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        home = Path(text).parts[0]
        hint = "Set HOME, or MOELOCAL_HOME." if home == "~" else f"For a file of that name: ./{text}"
        raise BadRequest(f"{text!r} cannot be a path: the home folder {home} is unknown.", hint) from error


def user_home() -> Path:
    """`MOELOCAL_HOME`, else the platform's folder for user data. Not created here.

    Raises:
        BadRequest: the home folder that it would be in is unknown.
    """
    if chosen := os.environ.get("MOELOCAL_HOME"):
        return user_path(chosen)
    if sys.platform == "darwin":
        return user_path("~") / "Library" / "Application Support" / "moelocal"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or user_path("~") / "AppData" / "Local") / "moelocal"
    return Path(os.environ.get("XDG_DATA_HOME") or user_path("~") / ".local" / "share") / "moelocal"


def cannot_keep(what: str, error: OSError) -> MoelocalError:
    """The error for what was to be kept in `user_home()` and could not be written there. `what` begins the sentence."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "Make room there" if is_full else "Let it be written to"
    return MoelocalError(
        f"{what} cannot be kept in {user_home()}: {error.strerror}.",
        f"{remedy}, or choose another folder: export MOELOCAL_HOME=FOLDER",
    )


def check_home(what: str) -> None:
    """Looks whether something can be kept in `user_home()`, before long work for it. `what` begins the sentence.

    Raises:
        MoelocalError: it cannot.
    """
    import tempfile

    try:
        user_home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=user_home()) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise cannot_keep(what, error) from error


def hub_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface-hub keeps what it downloads, by its own rules, without importing it (0.2 s)."""
    if chosen := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(chosen)).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "huggingface" / "hub"


def tuned_file(model: Path) -> Path:
    """Where is kept what tuning found best for this model file."""
    return user_home() / "tuned" / runs_file(model).with_suffix(".json").name


def runs_file(model: Path) -> Path:
    """Where is kept what was measured when this model file ran. Other files of its name and checksum may share it."""
    import zlib

    stem = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in model.stem[:40])
    return user_home() / "runs" / f"{stem}-{zlib.crc32(os.fsencode(model.resolve())):08x}.jsonl"
