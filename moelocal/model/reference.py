"""What a person types for MODEL, taken apart: text in, `Reference` out.

    parse_reference("qwen3-30b-a3b:Q4_K_M")                  # of the catalog: its repository, a quantization
    parse_reference("unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M")
    parse_reference("owner/repo/sub/model-00001-of-00002.gguf")
    parse_reference("https://huggingface.co/owner/repo/blob/main/model.gguf")    # as copied from a browser

Looks at no disk.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from moelocal.errors import BadRequest

if TYPE_CHECKING:
    from moelocal.model.catalog import Entry

_SITE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_REVISION = re.compile(r"(?P<repo>(?:[^/]+/){2})(?:blob|resolve|raw|tree)/(?P<name>[^/]+)/?")
_QUERY = re.compile(r"[?#].*$")
_WORD = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_WORD}/{_WORD}", re.ASCII)
_MAX_REPO_CHARS = 96  # the hub's
_MAX_PART_BYTES = 255  # of a file's or a folder's name, on most file systems
_NAME = re.compile(r"[\w.-]+", re.ASCII)
_QUANT = re.compile(r"[\w.-]{1,40}", re.ASCII)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\:]")


@dataclass(frozen=True, slots=True)
class Reference:
    """A MODEL that is no path: a repository `owner/repo` on the hub, by itself or by an `entry` of the catalog; of it
    perhaps a quantization, or one `file`. Without a repository, `name` is that of a model made here or by another tool.
    """

    text: str
    name: str
    repo: str = ""
    quant: str = ""
    file: str = ""
    entry: Entry | None = None

    @property
    def shown(self) -> str:
        """As messages call it."""
        return shortened(self.text)


def shortened(text: str) -> str:
    """A text for a message, not too long."""
    return text if len(text) < 80 else text[:77] + "..."


def parse_reference(text: str) -> Reference | None:
    """What `text` refers to, if it is no path; None: it can be nothing else.

    Raises:
        BadRequest: a file of a repository that would lie outside of it; an address of another version than main.
    """
    text = text.strip()
    rest = _without_site(text)
    if rest != text:
        rest = unquote(_QUERY.sub("", rest)).strip("/")
        found = _REVISION.match(rest)
        if found and found["name"] != "main":
            raise BadRequest(
                f"{shortened(text)!r} is of the version {found['name']!r:.60}; only main can be had.",
                f"To get main: moelocal pull {shlex.quote(found['repo'].strip('/'))}",
            )
        rest = _REVISION.sub(r"\g<repo>", rest).strip("/")
    if "/" not in rest:
        return _named(text, rest)
    owner, _, more = rest.partition("/")
    base, slash, file = more.partition("/")
    base, _, quant = base.partition(":") if not slash else (base, "", "")
    repo = f"{owner}/{base}"
    if not is_repo(repo) or (quant and not _QUANT.fullmatch(quant)):
        return None
    if file and not is_safe(file):
        raise BadRequest(
            f"{shortened(text)!r} leads out of the repository {repo}.", "Name a file in it: owner/repo/file.gguf"
        )
    if file and not file.lower().endswith(".gguf"):
        return None
    return Reference(text, repo, repo, quant, file, _entry_of(repo))


def _without_site(text: str) -> str:
    """An address of the hub, or of HF_ENDPOINT, without the site; any other text as it is."""
    own = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    for site in (own, own.partition("://")[2]):
        if site and text.lower().startswith(f"{site}/".lower()):
            return text[len(site) + 1 :]
    return _SITE.sub("", text, count=1) if _SITE.match(text) else text


def is_repo(name: str) -> bool:
    """Whether the hub would take this for `owner/repo`."""
    plain = "--" not in name and ".." not in name and not name.endswith(".git")
    return len(name) <= _MAX_REPO_CHARS and plain and bool(_REPO.fullmatch(name))


def is_safe(file: str) -> bool:
    """Whether a file's name in a repository stays inside wherever it is put, on any system."""
    try:
        parts = [part.encode() for part in file.split("/")]
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can have it
        return False
    return (
        not _UNSAFE.search(file)
        and all(part.strip(b". ") and len(part) <= _MAX_PART_BYTES for part in parts)
        and len(file) < 1000
    )


def _named(text: str, rest: str) -> Reference | None:
    """A name without a slash: of the catalog, or of a model that is only here."""
    from moelocal.model.catalog import find

    name, _, quant = rest.partition(":")
    if not _NAME.fullmatch(name) or (quant and not _QUANT.fullmatch(quant)):
        return None
    entry = find(name)
    return Reference(text, entry.name if entry else name, entry.repo if entry else "", quant, "", entry)


def _entry_of(repo: str) -> Entry | None:
    from moelocal.model.catalog import entries

    return next((entry for entry in entries() if entry.repo.lower() == repo.lower()), None)
