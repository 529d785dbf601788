"""A checkpoint on the Hugging Face hub, brought to this disk: at first its configuration, then what conversion needs.

remote = look("Qwen/Qwen3-30B-A3B")         # some kilobytes
folder = fetch(remote, watch)               # the weights; what is here already is not fetched again
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from moelocal.build.checkpoint import (
    CONFIG,
    INDEX,
    Checkpoint,
    architecture_of,
    check_tokenizer,
    check_whole,
    read_config,
    weight_map,
)
from moelocal.build.output import check_room as check_output_room
from moelocal.errors import BadRequest, ModelNotFound
from moelocal.model.client import HubError
from moelocal.model.download import Watch, cache_folder, check_room, download_files, file_targets, missing_bytes
from moelocal.model.hub import Contents, HubFile, list_files
from moelocal.model.reference import is_safe

_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.jsonl", "README.md")
_WEIGHTS = (".safetensors", ".bin")
_LARGEST_SMALL_BYTES = 256 << 20  # a vocabulary has some megabytes


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository's checkpoint: `head` is what its configuration tells, `files` what is needed of it. `contents` None:
    the hub could not be asked, and all is taken as it is here."""

    repo: str
    head: Checkpoint
    files: tuple[HubFile, ...] = ()
    contents: Contents | None = None


def look(repo: str, with_code: bool = False) -> Remote:
    """Finds out what a repository holds, and reads its configuration.

    Args:
        with_code: Python files are needed too.

    Raises:
        ModelNotFound: no such repository, or no checkpoint in it.
        BadRequest: files are missing there.
        HubError: the hub refuses, or cannot be reached and nothing is here.
    """
    try:
        contents = list_files(repo)
    except HubError as error:
        if (folder := _here(repo)) is None:
            raise
        del error
        return Remote(repo, _head(folder, 0))
    files = {file.path: file for file in contents.files if "/" not in file.path and is_safe(file.path)}
    if CONFIG not in files:
        raise _without_config(contents)
    first = [files[name] for name in (CONFIG, INDEX) if name in files]
    folder = download_files(contents, first, lambda _: None)[0].parent
    check_tokenizer(files, contents.repo)
    weights = _weights(contents.repo, files, folder)
    patterns = (*_SMALL, "*.py") if with_code else _SMALL
    small = [
        file for name, file in files.items() if _is_small(file) and any(fnmatchcase(name, one) for one in patterns)
    ]
    head = _head(folder, sum(file.n_bytes for file in weights))
    return Remote(contents.repo, head, (*small, *weights), contents)


def _head(folder: Path, n_bytes: int) -> Checkpoint:
    config = read_config(folder / CONFIG)
    return Checkpoint(folder, config, architecture_of(config), (), n_bytes)


def _is_small(file: HubFile) -> bool:
    return file.n_bytes <= _LARGEST_SMALL_BYTES


def _here(repo: str) -> Path | None:
    """The newest snapshot of a repository in the cache."""
    folder = cache_folder(repo)
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if (snapshot / CONFIG).is_file() else None


def _weights(repo: str, files: dict[str, HubFile], folder: Path) -> Sequence[HubFile]:
    if INDEX in files:
        wanted = sorted(set(weight_map(folder / INDEX).values()))
        check_whole(wanted, files, repo)
        return [files[name] for name in wanted]
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if found := [files[name] for name in sorted(files) if fnmatchcase(name, pattern)]:
            return found
    raise BadRequest(f"{repo} holds no weights in safetensors files.", "Choose another repository of this model.")


def _without_config(contents: Contents) -> ModelNotFound:
    repo = contents.repo
    if any(name.lower().endswith(".gguf") for name in contents.names):
        return ModelNotFound(f"{repo} holds GGUF files: there is nothing to convert.", f"Get one: moelocal pull {repo}")
    if "adapter_config.json" in contents.names:
        return ModelNotFound(f"{repo} holds an adapter (LoRA), not a whole model.", "Convert the model that it is for.")
    return ModelNotFound(f"{repo} holds no checkpoint: there is no config.json in it.", "Choose another repository.")


def missing(remote: Remote) -> int:
    """Bytes that are still to come."""
    return missing_bytes(file_targets(remote.contents, remote.files)) if remote.contents else 0


def check_download(remote: Remote, output: Path, output_bytes: int) -> None:
    """Looks whether there is room for what is still to come, and then for what is made of it.

    Raises:
        MoelocalError: there is not.
    """
    if remote.contents is not None:
        check_room(file_targets(remote.contents, remote.files))
    with_it = missing(remote) if _disk(output) == _disk(remote.head.folder) else 0
    check_output_room(output, output_bytes + with_it)


def _disk(path: Path) -> int:
    return next(one for one in (path, *path.absolute().parents) if one.exists()).stat().st_dev


def copy_head(remote: Remote, folder: Path) -> None:
    """Puts all but the weights, and what tells where they are, into a folder.

    Raises:
        HubError: the hub refuses, sends damaged bytes, or cannot be reached.
    """
    assert remote.contents is not None
    small = [file for file in remote.files if file.path != INDEX and not file.path.endswith(_WEIGHTS)]
    for path in download_files(remote.contents, small, lambda _: None):
        shutil.copyfile(path, folder / path.name)


def fetch(remote: Remote, watch: Watch) -> Path:
    """Fetches what is missing; gives the folder that holds all of it.

    Raises:
        HubError: the hub refuses, sends damaged bytes, or cannot be reached.
        MoelocalError: no room on the disk, or it cannot be written.
    """
    if remote.contents is None:
        return remote.head.folder
    return download_files(remote.contents, remote.files, watch)[0].parent
