"""The Hugging Face hub: which models a repository holds, as GGUF files, and what it says when it refuses.

    listing = list_models("unsloth/Qwen3-30B-A3B-GGUF")
    model = pick(listing, "Q4_K_M")        # its files with sizes and checksums: one, or all of a split model

huggingface_hub is slow to import, so that happens inside. It respects HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, proxies.
"""

from __future__ import annotations

import importlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from moelocal.errors import ModelNotFound, MoelocalError
from moelocal.model.quants import quant_in_name
from moelocal.model.reference import is_safe
from moelocal.model.stored import is_model

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
# model.gguf.part1of3, model.gguf-split-a, model.gguf.part-00: one GGUF file cut into pieces, to be joined again
_PIECE = re.compile(
    r"(?P<stem>.*)\.gguf(?:[.-]part(?P<number>\d+)of(?P<count>\d+)|[.-](?:split|part)-?(?P<letter>[a-z]|\d{1,3}))",
    re.IGNORECASE | re.DOTALL,
)
_LEAST_WAIT_S, _TOLD_WAIT_S, _MOST_WAIT_S = 0.5, 3.0, 60.0
_TRIES = 5
_TIMEOUT_S = 20.0
_MOST_BYTES = 1 << 44  # of a file; no model comes near it
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may be different a little later."""

T = TypeVar("T")


class HubError(MoelocalError):
    """The hub, or the way there, refuses; `status` is the HTTP status, 0 without an answer."""

    def __init__(self, message: str, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint)
        self.status = status


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


def client() -> Any:
    """The HTTP client that huggingface_hub uses, with its proxies and certificates."""
    from huggingface_hub import get_session

    return get_session()


def hub_utils() -> Any:
    """huggingface_hub.utils, which does not declare to type checkers what it exports."""
    return importlib.import_module("huggingface_hub.utils")


@cache
def http() -> Any:
    """The HTTP library of that client, for its exceptions: which one depends on huggingface_hub's version."""
    return importlib.import_module(type(client()).__module__.partition(".")[0])


def headers() -> dict[str, str]:
    """Headers of a request to the hub: the user's token, if there is one."""
    return {**hub_utils().build_hf_headers(library_name="moelocal"), "Accept-Encoding": "identity"}


def endpoint() -> str:
    """Where the hub is: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def list_models(repo: str) -> Listing:
    """The models of a repository, by one request to the hub.

    Raises:
        ModelNotFound: no such repository, or no GGUF file in it.
        HubError: the hub refuses, or there is no way to it.
    """
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi(library_name="moelocal").model_info(repo, files_metadata=True, timeout=_TIMEOUT_S)

    try:
        with translated(repo):
            info = patiently(ask)
    except OSError as error:
        hint = "Set HF_HOME to a folder of your own."
        raise MoelocalError(f"{error.filename or 'HF_HOME'} cannot be read: {error.strerror}.", hint) from error
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise HubError(
            f"{_site()} gives no version of {repo}: it does not speak as the hub does.", "Check HF_ENDPOINT."
        )
    files = []
    for entry in info.siblings or ():
        lfs = getattr(entry, "lfs", None)
        digest = lfs.sha256 if lfs else entry.blob_id or ""
        n_bytes = (lfs.size if lfs else entry.size) or 0
        if 0 < n_bytes < _MOST_BYTES and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
            files.append(HubFile(entry.rfilename, n_bytes, digest))
    models, incomplete = group(files)
    if not models:
        raise _without_models(repo, [entry.rfilename for entry in info.siblings or ()], incomplete)
    return Listing(repo, str(info.sha), models, incomplete)


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
    return ModelNotFound(
        f"{repo} holds no model: there is no GGUF file in it.", "Look for a repository named ...-GGUF."
    )


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
        quant = quant_in_name(stem.rpartition("/")[2]) or quant_in_name(stem) or "unknown"
        models.append(HubModel(quant, quant, stem, tuple(found[i] for i in whole), is_cut))
    return _labelled(sorted(models, key=lambda model: (model.n_bytes, model.stem))), tuple(incomplete)


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
        raise ModelNotFound(f"{listing.repo} holds no model file {file!r:.200}.", _there(listing))
    wanted = quant.upper()
    found = [model for model in listing.models if model.quant == wanted]
    found = found or [model for model in listing.models if _bare(model.quant) == _bare(wanted)]
    if len(found) > 1:
        names = ", ".join(f"{listing.repo}/{model.files[0].path}" for model in found[:4])
        raise ModelNotFound(f"{listing.repo} holds {len(found)} models of type {quant}.", f"Name its file: {names}")
    if not found:
        raise ModelNotFound(f"{listing.repo} holds no {quant!r:.60}.", _there(listing))
    return found[0]


def _bare(quant: str) -> str:
    return quant.removeprefix("UD-")


def _there(listing: Listing) -> str:
    labels = [model.label for model in listing.models]
    more = f" and {len(labels) - 40} more" if len(labels) > 40 else ""
    return f"There are: {', '.join(labels[:40])}{more}"


def patiently(ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again with growing pauses while the hub is busy or the line is bad."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(_TRIES):
        try:
            return ask()
        except OfflineModeIsEnabled:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in RETRIED or attempt == _TRIES - 1:
                raise
            wait_s = pause_s(attempt, error.response.headers)
        except http().TransportError:
            if attempt >= 1:  # a name that is unknown, or nobody at home: that does not change in seconds
                raise
            wait_s = pause_s(attempt, {})
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def pause_s(attempt: int, answered: Any) -> float:
    """Seconds to wait before asking again: what the server says (`Retry-After`, `RateLimit`), else longer each time.
    A long wait is told as a warning of Python's logging, which goes to stderr."""
    told = str(answered.get("Retry-After", ""))
    if not told and (limit := re.search(r";\s*t=(\d+)", str(answered.get("RateLimit", "")))):
        told = limit[1]  # seconds until the hub counts anew
    wait_s = min(float(told) if told.isdecimal() else _LEAST_WAIT_S * 2**attempt, _MOST_WAIT_S)
    if wait_s >= _TOLD_WAIT_S:
        logging.getLogger(__name__).warning("The hub is asked again in %.0f s.", wait_s)
    return wait_s


@contextmanager
def translated(repo: str) -> Iterator[None]:
    """Turns errors of the hub's client into plain words about a repository.

    Raises:
        ModelNotFound: there is no such repository, or it is private.
        HubError: everything else.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(repo, error.response.status_code) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"{repo} is not on this disk, and HF_HUB_OFFLINE forbids to look for it.", "Unset HF_HUB_OFFLINE."
        ) from error
    except errors.RepositoryNotFoundError as error:
        from moelocal.model.store import alike

        close = alike(repo)
        check = f"Did you mean {' or '.join(close)}?" if close else "Check the name."
        raise ModelNotFound(
            f"There is no repository {repo} on {_site()}, or it is private.",
            f"{check} For a private one, log in: hf auth login, or set HF_TOKEN.",
        ) from error
    except errors.HfHubHTTPError as error:
        raise refusal(repo, error.response) from error
    except errors.HFValidationError as error:
        raise ModelNotFound(
            f"{repo!r:.120} cannot be the name of a repository.", "Write it like owner/repo."
        ) from error
    except (http().HTTPError, http().InvalidURL, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this disk
        raise unreachable(error) from error


def refusal(repo: str, response: Any) -> HubError:
    """What an HTTP status that is no success means, for a person."""
    from huggingface_hub import get_token

    status = int(response.status_code)
    page = f"{endpoint()}/{repo}"
    if response.headers.get("X-Error-Code") == "GatedRepo":
        return _gated(repo, status)
    if status in (401, 403) and not get_token():
        text = f"{_site()} does not let everybody have {repo}."
        return HubError(text, f"Look at {page}, then log in: hf auth login, or set HF_TOKEN.", status)
    if status == 401:
        text = f"{_site()} does not accept your token: it has expired, or was revoked."
        return HubError(text, f"Make a new one at {endpoint()}/settings/tokens, then: hf auth login", status)
    if status == 403:
        text = f"{_site()} does not let you have {repo}: your token has no right to it."
        return HubError(text, f"Ask for access at {page}, then log in: hf auth login", status)
    if status == 404:
        return HubError(f"{page} does not have that file any more.", "Look again: the repository has changed.", status)
    if status == 416:
        return HubError(f"{page} has other bytes than it says.", "Try again later, or another repository.", status)
    if status == 429:
        text = f"{_site()} says that there were too many requests from here."
        return HubError(text, "Wait some minutes. With a token more are allowed: hf auth login", status)
    if status >= 500:
        return HubError(f"{_site()} has trouble: it answers {status}.", "Try again in some minutes.", status)
    return HubError(f"{_site()} refuses: it answers {status}.", f"See {page}", status)


def _gated(repo: str, status: int) -> HubError:
    page = f"{endpoint()}/{repo}"
    return HubError(
        f"{repo} is gated: its publisher wants you to agree to something first.",
        f"Open {page} and ask for access there, then log in: hf auth login, or set HF_TOKEN.",
        status,
    )


def unreachable(error: Any) -> HubError:
    """What a connection that failed means, for a person."""
    if isinstance(error, http().TooManyRedirects):
        return HubError(f"{_site()} sends from one address to another without an end.", "Try again later.")
    if isinstance(error, (http().UnsupportedProtocol, http().InvalidURL)):
        return HubError(f"{_site()} leads to an address that cannot be: {error}.", "Check HF_ENDPOINT and the proxy.")
    text = str(error) or type(error).__name__
    site = _site()
    with suppress(AttributeError, RuntimeError):  # what the request was sent on to may be another host
        site = error.request.url.netloc.decode("ascii", "replace")
    return HubError(
        f"{site} cannot be reached: {text:.200}.",
        "Check the network, and HF_ENDPOINT or HTTPS_PROXY if they are set. What is here is used offline.",
    )


def _site() -> str:
    return endpoint().partition("://")[2] or endpoint()
