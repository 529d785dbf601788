"""`moelocal rm`: a model's files removed, after asking."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moelocal.cli import options as opt
from moelocal.cli.screen import harmless
from moelocal.errors import BadRequest, ModelNotFound, MoelocalError

if TYPE_CHECKING:
    from moelocal.model.cache import Shelf
    from moelocal.model.removal import Removal
    from moelocal.model.stored import Stored

Stay = Annotated[str, typer.Argument(metavar="MODEL", help="A name from: moelocal list")]


def remove(
    model: Stay,
    yes: Annotated[bool, opt.option("--yes -y", "Do not ask.")] = False,
    unfinished: Annotated[bool, opt.option("--unfinished", "Only what downloads in part left of owner/repo.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Remove a model from this disk. Asks first; other tools' models are left alone."""
    from moelocal.model.download import is_being_fetched
    from moelocal.model.removal import plan_removal
    from moelocal.model.removal import remove as remove_files
    from moelocal.units import format_bytes

    try:
        removal = _leftovers(model, unfinished) or plan_removal(_stored(model))
    except OSError as error:
        raise MoelocalError(f"{model} cannot be removed: {error.strerror}.", "See: moelocal list") from error
    if any(map(is_being_fetched, removal.blobs)):
        raise BadRequest(f"{removal.name} is being downloaded.", "End that download first, or wait for it.")
    if not yes:
        _ask(model, removal)
    remove_files(removal)
    if as_json:
        files = [str(path) for path in removal.entries or removal.blobs]
        print(json.dumps({"name": removal.name, "freed_bytes": removal.freed_bytes, "files": files}))
        return
    print(f"Removed {harmless(removal.name)}: {format_bytes(removal.freed_bytes)} are free.")


def _leftovers(model: str, unfinished: bool) -> Removal | None:
    """What downloads that never ended have left of a repository, if nothing else is here of it, or if it is asked for.

    Raises:
        ModelNotFound: it is asked for, and there is nothing.
    """
    from moelocal.model.removal import plan_begun, plan_leftovers
    from moelocal.model.store import begun_here, made_folder

    repo, shelf = _repo(model), _shelf(model)
    found = plan_leftovers(shelf) if shelf and (unfinished or not shelf.models) else None
    if found is None and repo and (unfinished or not shelf):
        found = plan_begun(repo, begun_here(repo), made_folder())
    if unfinished and found is None:
        raise ModelNotFound(f"Nothing is here in part of {model!r:.200}.", "What is here: moelocal list")
    return found


def _repo(model: str) -> str:
    """The repository that is named as a whole; '' if something else is."""
    from moelocal.model.reference import parse_reference

    parsed = None if os.path.exists(model) else parse_reference(model)
    return parsed.repo if parsed and not (parsed.file or parsed.quant) else ""


def _shelf(model: str) -> Shelf | None:
    """What the Hugging Face cache holds of a repository that is named as a whole."""
    from moelocal.model.cache import shelf_of

    return shelf_of(repo) if (repo := _repo(model)) else None


def _stored(model: str) -> Stored:
    """The model that is meant, if it may be removed at all.

    Raises:
        BadRequest: the demo, a file that nobody gave to the store, or a repository with several models here.
        ModelNotFound: nothing here is called so.
    """
    from moelocal.model.store import all_names, resolve

    if model == "demo":
        raise BadRequest("The demo is part of moelocal.", "It goes with it: pipx uninstall moelocal")
    if (shelf := _shelf(model)) and len(shelf.models) > 1:
        names = ", ".join(one.name for one in shelf.models)
        raise BadRequest(f"{len(shelf.models)} models of {shelf.repo} are here.", f"Say which: {names}")
    try:
        path = resolve(model)
    except ModelNotFound as error:
        error.hint = error.hint if "mean" in error.hint else "What is here: moelocal list"
        raise
    named = path.absolute()
    real = None if path.is_symlink() else os.path.realpath(path)  # someone's link to a model is not that model
    candidates = list(all_names())
    for one in candidates:
        if named in map(Path.absolute, one.files):
            return one
    for one in candidates:
        if real is not None and real in map(os.path.realpath, one.files):
            return one
    if path.exists() or path.is_symlink():
        by_hand = f"To remove it: rm {shlex.quote(str(path))}"
        raise BadRequest(f"{path} is a file of yours and not in the store, so it is left alone.", by_hand)
    raise ModelNotFound(f"There is no file {path}.", "What is here: moelocal list")


def _ask(model: str, removal: Removal) -> None:
    """Lets a person decide.

    Raises:
        BadRequest: there is nobody to ask.
        SystemExit: the answer was no.
    """
    from moelocal.cli.messages import note
    from moelocal.units import format_bytes

    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        hint = f"Say so: moelocal rm {shlex.quote(model)} --yes"
        raise BadRequest(f"{removal.name} would be removed, but nobody can be asked.", hint)
    n = len({path.name for path in removal.entries or removal.blobs})
    note(f"{removal.name}: {n} {'file' if n == 1 else 'files'} in {removal.top}")
    if removal.shared_bytes:
        note(f"{format_bytes(removal.shared_bytes)} of it stay, since other files here share them.")
    print(f"Remove it and free {format_bytes(removal.freed_bytes)}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        note("Nothing was removed.")
        raise SystemExit(1)
