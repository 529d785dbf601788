"""The Hugging Face hub: which models a repository holds, as GGUF files.

listing = list_models("unsloth/Qwen3-30B-A3B-GGUF")
model = pick(listing, "Q4_K_M")        # its files with sizes and checksums: one, or all of a split model
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from moelocal.errors import ModelNotFound, MoelocalError
from moelocal.model.cache import shelf_of
from moelocal.model.client import check_token, not_the_hub, patiently, prepare, translated
from moelocal.model.quants import quant_in_name
from moelocal.model.reference import is_safe
from moelocal.model.stored import is_model

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
# model.gguf.part1of3, model.gguf-split-a, model.gguf.part-00: one GGUF file cut into pieces, to be joined again
_PIECE = re.compile(
    r"(?P<stem>.*)\.gguf(?:[.-]part(?P<number>\d+)of(?P<count>\d+)|[.-](?:split|part)-?(?P<letter>[a-z]|\d{1,3}))",
    re.IGNORECASE | re.DOTALL,
)
_TIMEOUT_S = 20.0
_MOST_BYTES = 1 << 44  # of a file; no model comes near it


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. `digest` is its SHA-256 (64 letters) or, without LFS, its git blob's SHA-1 (40)."""

    path: str
    n_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class HubModel:
    """One model of a repository: `files` are its shards, or (`is_cut`) the pieces of its one file, in order.

    `label` tells it from the others there: its quantization or, where that is not enough, its file's name.
    """

    label: str
    quant: str
    stem: str
    files: tuple[HubFile, ...]
    is_cut: bool = False

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit: its models, the smallest first; `incomplete` names split models that lack files."""

    repo: str
    commit: str
    models: tuple[HubModel, ...]
    incomplete: tuple[str, ...] = ()


class Contents(NamedTuple):
    """All files of a repository at one commit; `names` has also those that are empty or lack a checksum."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    names: tuple[str, ...]


def list_models(repo: str) -> Listing:
    """The models of a repository, by one request to the hub.

    Raises:
        ModelNotFound: no such repository, or no GGUF file in it.
        HubError: the hub refuses, or there is no way to it.
    """
    contents = list_files(repo)
    models, incomplete = group(list(contents.files))
    if not models:
        raise _without_models(repo, list(contents.names), incomplete)
    return Listing(contents.repo, contents.commit, models, incomplete)


def list_files(repo: str) -> Contents:
    """All files of a repository, by one request to the hub.

    Raises:
        ModelNotFound: no such repository.
        HubError: the hub refuses, or there is no way to it.
    """
    prepare()
    from huggingface_hub import HfApi

    check_token()

    def ask() -> Any:
        return HfApi(library_name="moelocal").model_info(repo, files_metadata=True, timeout=_TIMEOUT_S)

    try:
        with translated(repo):
            info = patiently(ask)
        commit, entries = _checked(info), list(info.siblings or ())
        files = tuple(file for entry in entries if (file := _file(entry)) is not None)
    except OSError as error:
        hint = "Set HF_HOME to a folder of your own."
        raise MoelocalError(f"{error.filename or 'HF_HOME'} cannot be read: {error.strerror}.", hint) from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # no JSON, or another's
        raise not_the_hub() from error
    return Contents(_spelled(repo, info.id), commit, files, tuple(entry.rfilename for entry in entries))


def _spelled(repo: str, told: object) -> str:
    """A repository's name in upper and lower case as the hub tells it, else as it is called here already: all of them
    are the same one there, but not to the cache."""
    if isinstance(told, str) and told.lower() == repo.lower():
        return told
    shelf = shelf_of(repo)
    return shelf.repo if shelf else repo


def _checked(info: Any) -> str:
    """The commit of an answer.

    Raises:
        ValueError: it is none.
    """
    if not (isinstance(info.sha, str) and re.fullmatch(r"[0-9a-f]{40}", info.sha)):
        raise ValueError(info.sha)
    return info.sha


def _file(entry: Any) -> HubFile | None:
    """A file of an answer; None: one without content, or without a checksum.

    Raises:
        TypeError, AttributeError: the hub does not speak so.
    """
    lfs = entry.lfs
    digest = lfs.sha256 if lfs else entry.blob_id or ""
    n_bytes = (lfs.size if lfs else entry.size) or 0
    if not (isinstance(entry.rfilename, str) and isinstance(n_bytes, int)):
        raise TypeError(entry)
    is_whole = 0 < n_bytes < _MOST_BYTES and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest)
    return HubFile(entry.rfilename, n_bytes, digest) if is_whole else None


def _without_models(repo: str, names: list[str], incomplete: tuple[str, ...]) -> ModelNotFound:
    if incomplete:
        return ModelNotFound(
            f"{repo} holds only a part of {incomplete[0]}.", "Files are missing there: choose another repository."
        )
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return ModelNotFound(
            f"{repo} holds no GGUF file, but a checkpoint to make one from.",
            f"Convert it: moelocal convert {repo}, or look for a repository named like {repo.rpartition('/')[2]}-GGUF.",
        )
    if left_out := next((name for name in names if name.lower().endswith(".gguf")), ""):
        return ModelNotFound(
            f"{repo} holds no model: {left_out!r:.90} is left out, since {_why_left_out(left_out)}.",
            "Look for another repository named ...-GGUF.",
        )
    return ModelNotFound(
        f"{repo} holds no model: there is no GGUF file in it.", "Look for a repository named ...-GGUF."
    )


def _why_left_out(file: str) -> str:
    if not is_safe(file):
        return "no file on a disk can be called so"
    if not is_model(file):
        return "by its name it is a projector or an importance matrix"
    return "the hub tells no size or no checksum of it"


def group(files: list[HubFile]) -> tuple[tuple[HubModel, ...], tuple[str, ...]]:
    """Models made of these files, the smallest first, and the names of split ones that are not complete.

    Names that would lead out of a folder are left out, as are files that are no models: projectors (mmproj) and
    importance matrices.
    """
    sets: dict[tuple[str, int, bool], dict[int, HubFile]] = {}
    for file in files:
        piece = _PIECE.fullmatch(file.path)
        if not is_safe(file.path) or not is_model(f"{piece['stem']}.gguf" if piece else file.path):
            continue
        if match := _SHARD.fullmatch(file.path):
            key = match["stem"], int(match["count"]), False
            sets.setdefault(key, {})[int(match["number"]) - 1] = file
        elif file.path.lower().endswith(".gguf"):
            sets[file.path[:-5], 1, False] = {0: file}
        elif piece:
            key = piece["stem"], int(piece["count"] or 0), True
            sets.setdefault(key, {})[_piece_number(piece)] = file
    models, incomplete = [], []
    for (stem, count, is_cut), found in sets.items():
        first = min(found)
        whole = range(first, first + (count or max(len(found), 2)))
        latest = int(is_cut and found[first].path[-1].isdecimal() and not count)  # -00 or -01
        if first > latest or sorted(found) != list(whole):
            incomplete.append(stem)
            continue
        quant = _quant_of(stem)
        models.append(HubModel(quant, quant, stem, tuple(found[i] for i in whole), is_cut))
    return _labelled(sorted(models, key=lambda model: (model.n_bytes, model.stem))), tuple(incomplete)


def _quant_of(stem: str) -> str:
    return quant_in_name(stem.rpartition("/")[2]) or quant_in_name(stem) or "unknown"


def _piece_number(match: re.Match[str]) -> int:
    if match["number"]:
        return int(match["number"]) - 1
    letter: str = match["letter"].lower()
    return int(letter) if letter.isdecimal() else ord(letter) - ord("a")


def _labelled(models: list[HubModel]) -> tuple[HubModel, ...]:
    """Models with labels of their own: where several have one quantization, all are called by their files' names."""
    quants = [model.quant for model in models]
    return tuple(
        model
        if quants.count(model.quant) == 1 and model.quant != "unknown"
        else replace(model, label=model.files[0].path)
        for model in models
    )


def pick(listing: Listing, quant: str = "", file: str = "") -> HubModel:
    """The model of a quantization, or that of a file. `Q4_K_M` is also `UD-Q4_K_M` if only that is there.

    Raises:
        ModelNotFound: with those that are there.
    """
    if file:
        for model in listing.models:
            if any(one.path == file for one in model.files):
                return model
        _refuse_half(listing, lambda stem: file.startswith(f"{stem}-0"))
        raise ModelNotFound(f"{listing.repo} holds no model file {file!r:.200}.", _there(listing))
    wanted = quant.upper()
    found = [model for model in listing.models if model.quant == wanted]
    found = found or [model for model in listing.models if _bare(model.quant) == _bare(wanted)]
    if len(found) > 1:
        names = ", ".join(shlex.quote(f"{listing.repo}/{model.files[0].path}") for model in found[:4])
        raise ModelNotFound(f"{listing.repo} holds {len(found)} models of type {quant}.", f"Name its file: {names}")
    if not found:
        _refuse_half(listing, lambda stem: _bare(_quant_of(stem)) == _bare(wanted))
        raise ModelNotFound(f"{listing.repo} holds no {quant!r:.60}.", _there(listing))
    return found[0]


def _refuse_half(listing: Listing, is_meant: Callable[[str], bool]) -> None:
    """Refuses a split model that is not complete on the hub.

    Raises:
        ModelNotFound: one of them is meant.
    """
    if stem := next(filter(is_meant, listing.incomplete), ""):
        raise ModelNotFound(f"{listing.repo} holds only a part of {stem}: files are missing there.", _there(listing))


def _bare(quant: str) -> str:
    return quant.removeprefix("UD-")


def _there(listing: Listing) -> str:
    labels = [model.label for model in listing.models]
    more = f" and {len(labels) - 40} more" if len(labels) > 40 else ""
    return f"There are: {', '.join(labels[:40])}{more}"
