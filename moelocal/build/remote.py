"""A checkpoint on the Hugging Face hub, brought to this disk: at first its configuration, then what conversion needs.

remote = look("Qwen/Qwen3-30B-A3B")         # some kilobytes
folder = fetch(remote, watch)               # the weights; what is here already is not fetched again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moelocal.build.checkpoint import CONFIG, INDEX, check_tokenizer, check_whole, read_config, weight_map
from moelocal.errors import BadRequest, ModelNotFound
from moelocal.model.client import HubError
from moelocal.model.download import Watch, cache_folder, check_room, download_files, file_targets
from moelocal.model.hub import Contents, HubFile, list_files
from moelocal.model.reference import is_safe

_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.jsonl", "README.md")
_LARGEST_SMALL_BYTES = 256 << 20  # a vocabulary has some megabytes


@dataclass(frozen=True, slots=True)
class Remote:
    """A checkpoint of which `folder` holds the configuration; `files` are what is needed of the repository, none when
    the hub could not be asked and all is here."""

    repo: str
    folder: Path
    config: dict[str, Any]
    files: tuple[HubFile, ...]
    contents: Contents | None = None

    @property
    def weight_bytes(self) -> int:
        """Of the files with weights."""
        return sum(file.n_bytes for file in self.files if file.path.endswith((".safetensors", ".bin")))


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
        return Remote(repo, folder, read_config(folder / CONFIG), ())
    files = {file.path: file for file in contents.files if "/" not in file.path and is_safe(file.path)}
    if CONFIG not in files:
        raise _without_config(contents)
    head = [files[name] for name in (CONFIG, INDEX) if name in files]
    folder = download_files(contents, head, lambda _: None)[0].parent
    config = read_config(folder / CONFIG)
    check_tokenizer(files, contents.repo)
    weights = _weights(contents.repo, files, folder)
    patterns = (*_SMALL, "*.py") if with_code else _SMALL
    small = [
        file for name, file in files.items() if _is_small(file) and any(fnmatchcase(name, one) for one in patterns)
    ]
    return Remote(contents.repo, folder, config, (*small, *weights), contents)


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


def check_download(remote: Remote) -> None:
    """Looks whether the disk has room for what is still to come.

    Raises:
        MoelocalError: it has not.
    """
    if remote.contents is not None:
        check_room(file_targets(remote.contents, remote.files))


def fetch(remote: Remote, watch: Watch) -> Path:
    """Fetches what is missing; gives the folder that holds all of it.

    Raises:
        HubError: the hub refuses, sends damaged bytes, or cannot be reached.
        MoelocalError: no room on the disk, or it cannot be written.
    """
    if remote.contents is None:
        return remote.folder
    return download_files(remote.contents, remote.files, watch)[0].parent
