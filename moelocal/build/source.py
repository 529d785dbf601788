"""The source distribution of llama-cpp-python, as pip finds it here: from an index, a wheel house, or pip's cache.

pip prepares the metadata of a source distribution before it keeps the file, for which it would fetch and run a build
system. A stand-in for that build system answers instead, so that nothing is built and nothing else is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

from moelocal.build.child import running
from moelocal.errors import MoelocalError

_BACKEND = """
import os

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "llama_cpp_python-{version}.dist-info"
    os.mkdir(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as out:
        out.write("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {version}\\n")
    return name

def build_wheel(*args, **kwargs):
    raise NotImplementedError("only the source is wanted")
"""
_RAW_PROGRESS_FROM = (24, 1)  # pip's --progress-bar raw: `Progress 1024 of 76589250`
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_NO_BACKEND = re.compile(r"metadata-generation-failed|BackendUnavailable|Cannot import '")
_UNREACHABLE = re.compile(r"Retrying \(|Could not fetch URL \S+ (?:connection error|timed out)|NewConnectionError")
_HASHES_DIFFER = re.compile(r"DO NOT MATCH THE HASHES")
_LEAST_BYTES = 1 << 20


def fetch(version: str, folder: Path, watch: Callable[[int, int], None]) -> tuple[Path, bool, str]:
    """The source distribution of a version: (file, whether its checksum is the index's, where it is from). What has to
    be downloaded goes into `folder`.

    Raises:
        MoelocalError: pip does not get it, and its cache does not have it.
    """
    if importlib.util.find_spec("pip") is None:
        raise _without(version, "pip is not installed here", f"{sys.executable} -m ensurepip")
    log = folder / "pip.log"
    is_done, output = _download(version, folder, log, watch)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if not (is_done and found):  # on a full disk pip leaves a part of it
        if (cached := _in_pip_cache(version)) is not None:
            return cached, False, "pip's cache"
        raise _refusal(version, output, text)
    return found[0], *_provenance(found[0], text)


def _download(version: str, folder: Path, log: Path, watch: Callable[[int, int], None]) -> tuple[bool, str]:
    """Runs `pip download`; gives whether it succeeded, and what it printed."""
    backend = folder / "backend" / "scikit_build_core"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build.py").write_text(_BACKEND.format(version=version), encoding="utf-8")
    paths = [str(backend.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    status, output = 1, ""
    for how, more_env in ((["--no-build-isolation"], {"PYTHONPATH": os.pathsep.join(paths)}), ([], {})):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", *how]
        command += ["--dest", str(folder), "--log", str(log), "--progress-bar", _bar(), "--no-input"]
        command += ["--disable-pip-version-check", f"llama-cpp-python=={version}"]
        output = ""
        with running(command, more_env=more_env, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if match := _PROGRESS.search(line):
                    watch(int(match[1]), int(match[2]))
                else:
                    output += line
            status = process.wait()
        if status == 0 or not _NO_BACKEND.search(output):
            break  # a later version may have another build system: then pip does what it always does
    return status == 0, output


def _bar() -> str:
    release = importlib.metadata.version("pip").split(".")[:2]
    return "raw" if tuple(int(part) for part in release if part.isdecimal()) >= _RAW_PROGRESS_FROM else "off"


def _provenance(path: Path, log: str) -> tuple[bool, str]:
    """Whether a downloaded file's checksum is the one that an index publishes, and where it is from. pip has compared
    it already; HTML pages show it in the link, which is compared once more, JSON pages in a field.

    Raises:
        MoelocalError: it is another one.
    """
    links = re.findall(
        r"Found link (\S+?)(?:#(\S+))?(?: \(from ([^)]+)\))?(?: \(requires-python:[^)]*\))?, version", log
    )
    for url, fragment, page in reversed(links):
        if unquote(url).rpartition("/")[2] != path.name:
            continue
        origin = re.sub(r"//[^/@]*@", "//", page or url)
        for kind in ("sha256", "sha384", "sha512"):
            if told := re.search(rf"{kind}=([0-9a-f]+)", fragment):
                if hashlib.new(kind, path.read_bytes()).hexdigest() != told[1]:
                    raise _damaged()
                return True, origin
        return bool(page) and f"{page} as application/vnd.pypi.simple" in log, origin
    return False, "pip"


def _in_pip_cache(version: str) -> Path | None:
    """The file where pip keeps what it has downloaded: what pip itself does not look into without a network."""
    for folder in _pip_caches():
        with contextlib.suppress(OSError):
            for body in folder.rglob("*.body"):
                with contextlib.suppress(OSError, tarfile.TarError, EOFError):
                    if body.stat().st_size >= _LEAST_BYTES and _first_member(body).startswith(
                        f"llama_cpp_python-{version}/"
                    ):
                        return body
    return None


def _pip_caches() -> Iterator[Path]:
    done = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout.strip():
        yield Path(done.stdout.strip().splitlines()[-1]) / "http-v2"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in sorted((cache / "moelocal").glob("pip-*")):  # where scripts/setup.sh lets pip keep it
        yield folder / "http-v2"


def _first_member(archive: Path) -> str:
    with archive.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b":
            return ""
    with tarfile.open(archive, "r:gz") as tar:
        first = tar.next()
    return f"{first.name}/" if first else ""


def _refusal(version: str, output: str, log: str) -> MoelocalError:
    """What pip's output and its log mean."""
    if _HASHES_DIFFER.search(output):
        return _damaged()
    if "No space left on device" in output:
        return MoelocalError("The disk is full: the converter could not be fetched.", "Make room, then run it again.")
    if _UNREACHABLE.search(log):
        return _without(version, "the package index cannot be reached")
    errors = re.findall(r"^ERROR: (.*)", output, re.MULTILINE)
    if any("No matching distribution" in error for error in errors):
        return _without(version, "pip finds no source distribution of it")
    reason = errors[-1].strip().rstrip(".") if errors else "it gives no reason"
    return _without(version, f"pip fails: {reason:.200}")


def _without(version: str, reason: str, first: str = "") -> MoelocalError:
    name = f"llama_cpp_python-{version}.tar.gz"
    start = f"First: {first}. Or" if first else "Then run it again with a network, or"
    return MoelocalError(
        f"The converter of llama-cpp-python {version} cannot be fetched: {reason}.",
        f"{start} get {name} elsewhere and give it: --converter {name}, or put it into a folder for PIP_FIND_LINKS.",
    )


def _damaged() -> MoelocalError:
    return MoelocalError(
        "The source of llama-cpp-python came damaged: its checksum is not the one that the index publishes.",
        "Run it again. If that happens twice, a proxy or this computer's memory may be at fault.",
    )
