"""The converter fetched with the real pip: from a local index, a wheel house, pip's cache; kept, verified, refused."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moelocal.build import converter
from moelocal.build.converter import engine_version, find_converter, is_here
from moelocal.errors import BadRequest, MoelocalError
from tests.build.checkpoints import ARCHITECTURE, converter_files, write_converter

VERSION = engine_version()
NAME = f"llama_cpp_python-{VERSION}.tar.gz"


def make_sdist(files: dict[str, str] | None = None) -> bytes:
    """A source distribution that cannot be built, with the converter where llama-cpp-python has it."""
    below = {f"vendor/llama.cpp/{name}": text for name, text in (converter_files() if files is None else files).items()}
    below["vendor/llama.cpp/src/llama.cpp"] = "int main() {}"
    below["PKG-INFO"] = f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {VERSION}\n"
    below["pyproject.toml"] = (
        '[build-system]\nrequires = ["scikit-build-core>=0.9.2"]\nbuild-backend = "scikit_build_core.build"\n'
        f'[project]\nname = "llama_cpp_python"\nversion = "{VERSION}"\n'
    )
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in below.items():
            entry = tarfile.TarInfo(f"llama_cpp_python-{VERSION}/{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


class Index:
    """A package index that has one file. `kind`: html, json, or bare (html without checksums)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.kind, self.digest = data, "html", hashlib.sha256(data).hexdigest()
        self.served: list[str] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.served.append(self.path)
                kind, body = index.answer(self.path)
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/simple"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str) -> tuple[str, bytes]:
        if path.endswith(NAME):
            return "application/gzip", self.data
        if not path.startswith("/simple/llama-cpp-python"):
            return "text/html", b""
        if self.kind == "json":
            file = {"filename": NAME, "url": f"/files/{NAME}", "hashes": {"sha256": self.digest}}
            page = {"meta": {"api-version": "1.0"}, "name": "llama-cpp-python", "files": [file]}
            return "application/vnd.pypi.simple.v1+json", json.dumps(page).encode()
        fragment = "" if self.kind == "bare" else f"#sha256={self.digest}"
        return "text/html", f'<!DOCTYPE html><html><body><a href="/files/{NAME}{fragment}">{NAME}</a>'.encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def pip_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of this machine's pip."""
    import os

    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    server = Index(make_sdist())
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    yield server
    server.close()


def kept(home: Path) -> list[str]:
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind,is_checked", [("html", True), ("json", True), ("bare", False)])
def test_fetched_once_verified_and_kept(index: Index, home: Path, kind: str, is_checked: bool) -> None:
    index.kind = kind
    seen: list[tuple[int, int]] = []
    assert not is_here()
    found = find_converter(watch=lambda done, total: seen.append((done, total)))
    assert is_here() and found.is_checked == is_checked and found.origin.startswith(index.url)
    assert ARCHITECTURE in found.architectures() and len(found.architectures()) == 2
    assert all(done <= total == len(index.data) for done, total in seen)
    folder = f"converter/{VERSION}"
    assert kept(home) == sorted(f"{folder}/{name}" for name in [*converter_files(), "origin.json"])
    served = len(index.served)
    assert find_converter() == found and len(index.served) == served


def test_other_bytes_than_the_index_says_are_refused(index: Index, home: Path) -> None:
    index.digest = "0" * 64
    with pytest.raises(MoelocalError, match="came damaged: its checksum"):
        find_converter()
    assert kept(home) == [] and not is_here()


def test_a_wheel_house_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / NAME).write_bytes(make_sdist())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    found = find_converter()
    assert not found.is_checked and "wheels" in found.origin and found.version == VERSION


def test_no_network_then_what_pip_has_kept(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(MoelocalError, match="cannot be fetched: the package index cannot be reached") as caught:
        find_converter()
    assert f"--converter {NAME}" in caught.value.hint and "PIP_FIND_LINKS" in caught.value.hint
    assert kept(home) == []
    body = tmp_path / "pip" / "http-v2" / "a" / "b" / "abc.body"
    body.parent.mkdir(parents=True)
    body.write_bytes(make_sdist())
    monkeypatch.setattr("moelocal.build.source._LEAST_BYTES", 1)
    found = find_converter()
    assert found.origin == "pip's cache" and not found.is_checked


def test_a_full_disk_is_no_damaged_source(index: Index, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """pip leaves what it could write of the file."""

    def download(_version: str, folder: Path, *_: object) -> tuple[bool, str]:
        (folder / NAME).write_bytes(index.data[:100])
        return False, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"

    monkeypatch.setattr("moelocal.build.source._download", download)
    with pytest.raises(MoelocalError, match="The disk is full"):
        find_converter()
    assert kept(home) == []


def test_an_index_without_this_version(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "answer", lambda path: ("text/html", b"<html>"))
    with pytest.raises(MoelocalError, match="pip finds no source distribution of it"):
        find_converter()


def test_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MoelocalError, match="pip is not installed here") as caught:
        find_converter()
    assert "-m ensurepip" in caught.value.hint


def test_given_by_hand(tmp_path: Path, home: Path) -> None:
    archive = tmp_path / NAME
    archive.write_bytes(make_sdist())
    found = find_converter(archive)
    assert found.version == VERSION and not found.is_checked and not is_here()
    assert find_converter(archive) == found
    folder = write_converter(tmp_path / "llama.cpp")
    assert find_converter(folder).folder == folder and find_converter(folder).version == "unknown"
    (tmp_path / "sdist" / "vendor").mkdir(parents=True)
    write_converter(tmp_path / "sdist" / "vendor" / "llama.cpp")
    (tmp_path / "sdist" / "PKG-INFO").write_text("Metadata-Version: 2.1\nVersion: 9.9\n")
    assert find_converter(tmp_path / "sdist").version == "9.9"


def test_given_what_is_none(tmp_path: Path, home: Path) -> None:
    with pytest.raises(BadRequest, match="There is no"):
        find_converter(tmp_path / "nothing.tar.gz")
    with pytest.raises(BadRequest, match=r"does not hold llama\.cpp's converter"):
        find_converter(tmp_path)
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"no archive at all")
    with pytest.raises(MoelocalError, match="is no source distribution"):
        find_converter(broken)
    broken.write_bytes(make_sdist()[:200])
    with pytest.raises(MoelocalError, match="is no source distribution"):
        find_converter(broken)
    broken.write_bytes(make_sdist({"README.md": ""}))
    with pytest.raises(MoelocalError, match=r"does not hold llama\.cpp's converter"):
        find_converter(broken)
    assert kept(home) == []


def test_names_that_lead_out_are_left_out(tmp_path: Path, home: Path) -> None:
    archive = tmp_path / "evil.tar.gz"
    archive.write_bytes(
        make_sdist({**converter_files(), "conversion/../../../../evil.py": "", "gguf-py/gguf/x/../y.py": ""})
    )
    find_converter(archive)
    assert not [name for name in kept(home) if "evil.py" in name or (name.endswith("y.py") and "/x/" in name)]
    assert not list(tmp_path.rglob("evil.py"))


def test_a_registry_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_converter(tmp_path / "c")
    (folder / "conversion/__init__.py").write_text("TEXT_MODEL_MAP = 3")
    with pytest.raises(MoelocalError, match="it has no list of architectures"):
        find_converter(folder).architectures()
    assert converter.SCRIPT in {path.name for path in folder.iterdir()}
