"""Models that Ollama and LM Studio have here: used where they are, never changed.

Ollama keeps a manifest for each name and its layers as blobs; the layer of type `model` is a GGUF file:

    models/manifests/registry.ollama.ai/library/qwen3/30b   {"layers": [{"mediaType": "...image.model", "digest": ...}]}
    models/blobs/sha256-...

LM Studio keeps files as the hub does: models/OWNER/REPO/FILE.gguf.

Source: ollama 5c0caaff8, types/model/name.go, manifest/paths.go; lmstudio-ai/lms 3cc02018, src/modelsFolder.ts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moelocal.model.quants import quant_in_name
from moelocal.model.reference import is_repo
from moelocal.model.stored import Stored, called, files_below, models_among, quant_of

_MANIFEST_BYTES = 1 << 20
_MODEL_LAYER = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_DEFAULT_HOST, _DEFAULT_OWNER, _DEFAULT_TAG = "registry.ollama.ai", "library", "latest"


def ollama_folders() -> list[Path]:
    """Where Ollama's models are: `OLLAMA_MODELS`, else this user's and those of the Linux service."""
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen)]
    own = _home() / ".ollama" / "models"
    return [own, Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama/models")]


def ollama_models() -> Iterator[Stored]:
    """Ollama's models, by the names that `ollama list` shows."""
    for folder in ollama_folders():
        for name in files_below(folder / "manifests", depth=5):
            if (model := _manifest(folder, name)) is not None:
                yield model


def ollama_model(name: str) -> Stored | None:
    """The model that Ollama calls so; without a tag, `latest`."""
    wanted = name.lower() if ":" in name.rpartition("/")[2] else f"{name.lower()}:{_DEFAULT_TAG}"
    return next((model for model in ollama_models() if model.name.lower() == wanted), None)


def _manifest(folder: Path, name: str) -> Stored | None:
    """The model of one manifest, if its blob is here and whole."""
    parts = name.split("/")
    if len(parts) != 4:
        return None
    try:
        with (folder / "manifests" / name).open("rb") as stream:
            manifest = json.loads(stream.read(_MANIFEST_BYTES))
        layers = [layer for layer in manifest["layers"] if layer["mediaType"] == _MODEL_LAYER]
        digests = [_DIGEST.fullmatch(layer["digest"]) for layer in layers]
        sizes = [layer.get("size") for layer in layers]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if len(digests) != 1 or digests[0] is None:  # several: a model in pieces, of which none is a GGUF file
        return None
    blob = _blob(folder, digests[0][1])
    if blob is None or (isinstance(sizes[0], int) and os.path.getsize(blob) != sizes[0]):
        return None
    host, owner, base, tag = parts
    shown = base if (host, owner) == (_DEFAULT_HOST, _DEFAULT_OWNER) else f"{owner}/{base}"
    shown = shown if host == _DEFAULT_HOST else f"{host}/{owner}/{base}"
    return Stored(f"{shown}:{tag}", (blob,), "ollama", quant_in_name(tag))


def _blob(folder: Path, digest: str) -> Path | None:
    for mark in "-:":  # older versions
        blob = folder / "blobs" / f"sha256{mark}{digest}"
        if os.path.isfile(blob):
            return blob
    return None


def lmstudio_folders() -> list[Path]:
    """Where LM Studio's models are: as its settings say, else in its home."""
    home = _home()
    places = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    if pointed := _read(home / ".lmstudio-home-pointer").strip():
        places.insert(0, Path(pointed))
    folders = []
    for place in places:
        try:
            chosen = json.loads(_read(place / "settings.json") or "{}").get("downloadsFolder")
        except (ValueError, AttributeError, RecursionError):
            chosen = None
        folders.append(Path(chosen).expanduser() if isinstance(chosen, str) and chosen else place / "models")
    return list(dict.fromkeys(folders))


def lmstudio_models(names: dict[str, str], wanted: str = "") -> Iterator[Stored]:
    """LM Studio's models, by repository; those of one, if it is `wanted`. `names`: what to call repositories."""
    for folder in lmstudio_folders():
        for owner in _subfolders(folder):
            for base in _subfolders(folder / owner):
                repo = f"{owner}/{base}"
                if is_repo(repo) and wanted.lower() in ("", repo.lower()):
                    yield from _in_repository(repo, folder / owner / base, names.get(repo.lower(), repo))


def _in_repository(repo: str, folder: Path, name: str) -> Iterator[Stored]:
    models = []
    for files in models_among(files_below(folder, depth=2))[0]:
        paths = tuple(folder / file for file in files)
        models.append(Stored("", paths, "lmstudio", quant_of(files[0]), repo, files[0]))
    for model, one in zip(models, called(models, name), strict=True):
        yield replace(model, name=one)


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(_MANIFEST_BYTES).decode("utf-8-sig", "replace")
    except (OSError, ValueError):
        return ""


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)
