"""The header of a model on the hub, read over HTTP before anything is downloaded: a few megabytes, kept for later.

    header, where = open_header("unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M")

A header stands at the beginning of its file, but does not say how long it is. So some bytes are fetched and parsed, and
more when they were too few. Shards after the first hold no vocabulary: a small piece of each is enough.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from moelocal.errors import BadGGUF, BadRequest, ModelNotFound
from moelocal.model.client import HubError
from moelocal.model.header import GGUFHeader, merge_shards, parse_header
from moelocal.model.hub import HubFile, HubModel, Listing, group, list_models, pick
from moelocal.model.ranges import RemoteFile
from moelocal.model.reference import parse_reference
from moelocal.paths import user_home

_FIRST_BYTES = 4 << 20
_MOST_BYTES = 96 << 20  # of one header; vocabularies are of up to 16 MiB
_SHARD_BYTES = 256 << 10
_LEAST_SHARD_BYTES = 32 << 10
_SHARDS_BYTES = 6 << 20  # of all shards after the first together
_TENSOR_BYTES = 160  # of a row in the table, more than they are
_AT_ONCE = 4
_KEPT_BYTES = 256 << 20  # of headers on disk: of about 40 models
_FOUR_BITS = re.compile(r"(?:Q|FP)[4-6]")


def open_header(reference: str) -> tuple[GGUFHeader, str]:
    """The header of a model on the hub, and what it is: `owner/repo Q4_K_M, 18.6 GB in 3 files`.

    Without a quantization it is the catalog's, else Q4_K_M, else the one of about its size.

    Raises:
        ModelNotFound: no such model on the hub.
        BadRequest: the reference is of no form that the hub knows.
        HubError: the hub refuses, or there is no way to it.
        BadGGUF: what it holds is no usable GGUF file.
    """
    asked = parse_reference(reference)
    if asked is None or not asked.repo:
        raise BadRequest(f"{reference!r:.90} is no model of the hub.", "Write it like owner/repo:Q4_K_M.")
    listing = _listing(asked.repo)
    if asked.quant or asked.file:
        model = pick(listing, asked.quant, asked.file)
    else:
        model = usual(listing, asked.entry.quant if asked.entry else "Q4_K_M")
    n_files = f" in {len(model.files)} files" if len(model.files) > 1 else ""
    return read_remote(listing, model), f"{listing.repo} {model.label}, {model.n_bytes / 1e9:.1f} GB{n_files}"


def _listing(repo: str) -> Listing:
    """What a repository holds; as it was when it was asked last, where there is no way to the hub."""
    kept = user_home() / "listings" / f"{repo.replace('/', '--')}.json"
    try:
        listing = list_models(repo)
    except HubError as error:
        with contextlib.suppress(OSError, ValueError, TypeError):
            commit, files = json.loads(kept.read_bytes()) if error.status == 0 else ("", ())
            models, incomplete = group([HubFile(str(path), int(size), str(digest)) for path, size, digest in files])
            if models:
                return Listing(repo, str(commit), models, incomplete)
        raise
    files = [(file.path, file.n_bytes, file.digest) for model in listing.models for file in model.files]
    _keep(kept, json.dumps([listing.commit, files]).encode())
    return listing


def usual(listing: Listing, quant: str = "Q4_K_M") -> HubModel:
    """The model to look at when none was named: of that quantization, or of about its size."""
    with contextlib.suppress(ModelNotFound):
        return pick(listing, quant)
    four_bits = (model for model in listing.models if _FOUR_BITS.search(model.quant))
    return next(four_bits, listing.models[len(listing.models) // 2])


def read_remote(listing: Listing, model: HubModel) -> GGUFHeader:
    """The header of a model of a repository: from this disk if it was read before, else from the hub."""
    size = model.n_bytes if model.is_cut else model.files[0].n_bytes
    first = _read(listing, model.files[0], size, _grown)
    if len(model.files) == 1 or model.is_cut:
        return replace(first, shards=(model.files[0].path,))
    rest = model.files[1:]
    start = max(_LEAST_SHARD_BYTES, min(_SHARD_BYTES, _SHARDS_BYTES // len(rest)))

    def shard(file: HubFile) -> GGUFHeader:
        return _read(listing, file, file.n_bytes, lambda data: _needed(data) if data else start)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        headers = [first, *pool.map(shard, rest)]
    named = zip(headers, model.files, strict=True)
    return merge_shards([replace(header, shards=(file.path,)) for header, file in named])


def _grown(data: bytes) -> int:
    """How many bytes of a first file to have, after those that were too few."""
    more = len(data) * 2 if len(data) < 4 * _FIRST_BYTES else len(data) * 3 // 2
    return min(_MOST_BYTES, more) if data else _FIRST_BYTES


def _needed(data: bytes) -> int:
    """How many bytes of a later shard to have: by the number of its tensors, which stands at its beginning."""
    n_tensors = int.from_bytes(data[8:16], "little")
    return min(_MOST_BYTES, 2 * len(data) + n_tensors * _TENSOR_BYTES)


def _read(listing: Listing, file: HubFile, n_bytes: int, wanted: Callable[[bytes], int]) -> GGUFHeader:
    """The header of one file of `n_bytes`; `wanted` says how many bytes to try with, after those there are."""
    name = file.path.rpartition("/")[2]
    kept = _folder() / f"{file.digest}.gguf-header"
    with contextlib.suppress(OSError, BadGGUF):
        data = kept.read_bytes()
        header = parse_header(io.BytesIO(data), n_bytes, name)
        with contextlib.suppress(OSError):
            os.utime(kept)
        return header
    remote = RemoteFile(listing.repo, listing.commit, file)
    data = b""
    while True:
        end = min(wanted(data), file.n_bytes)
        is_last = end <= len(data)
        if not is_last:
            data += remote.read(len(data), end)
        try:
            header = parse_header(io.BytesIO(data), n_bytes, name)
        except BadGGUF as error:
            if is_last or error.offset < len(data) or not data.startswith(b"GGUF") or len(data) == file.n_bytes:
                raise
            continue
        _keep(kept, data[: header.data_offset])
        return header


def _folder() -> Path:
    return user_home() / "headers"


def _keep(kept: Path, data: bytes) -> None:
    """Writes a header for the next time, and drops the oldest of many; a disk that is full or read-only is no error."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=kept.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.replace(name, kept)
        except OSError:
            os.unlink(name)
            raise
        left = _KEPT_BYTES
        for one in sorted(kept.parent.glob("*.gguf-header"), key=lambda one: -one.stat().st_mtime):
            left -= one.stat().st_size
            if left < 0 and one != kept:
                one.unlink(missing_ok=True)
