"""A real HTTP server that speaks the hub's API for repositories in memory or on disk, and misbehaves when told to.

    with HubServer() as hub:
        hub.add("owner/repo", "model-Q4_K_M.gguf", path_or_bytes)
        hub.wire["model-Q4_K_M.gguf"]        # bytes sent of that file's content

`resolve` answers with a redirect to another address (another host name), as the hub does to its CDN.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_PIECE = 64 << 10


@dataclass
class Stored:
    """A file of a repository, in memory or on disk."""

    data: bytes | Path
    digest: str

    @property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size


@dataclass
class Faults:
    """How the server misbehaves: `status` are answers to be given instead, used up one after the other (0: a good
    one)."""

    status: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    api_status: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    api_answer: bytes | None = None
    """What is sent with status 200 instead of a repository's contents."""
    ignores_ranges: bool = False
    wrong_range: bool = False
    size_told: int | None = None
    drop_after: list[int] = field(default_factory=list)
    """Bytes after which an answer breaks off, used up."""
    flip_at: int | None = None
    """The byte of a file that is sent wrongly."""
    bytes_per_s: float | None = None
    redirect: str | None = None
    gzip: bool = False


class HubServer:
    """Starts at once, on a free port of the loopback interface."""

    def __init__(self, redirects: bool = True) -> None:
        self.repos: dict[str, dict[str, Stored]] = {}
        self.faults = Faults()
        self.redirects = redirects
        self.token: str | None = None
        """If set, requests to the hub's own address need it."""
        self.gated: set[str] = set()
        self.wire: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, range) of each."""
        self.sending: set[int] = set()
        self.most_lines = 0
        """Files' contents sent at the same time."""
        self.leaked = False
        """Whether a token came to the address that is not the hub's."""
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo: str, name: str, data: bytes | Path, digest: str | None = None) -> Stored:
        """Adds a file; its SHA-256 is computed unless given (for sparse files of many gigabytes)."""
        if digest is None:
            digest = hashlib.sha256(data if isinstance(data, bytes) else data.read_bytes()).hexdigest()
        stored = self.repos.setdefault(repo, {})[name] = Stored(data, digest)
        return stored

    def env(self, folder: Path) -> dict[str, str]:
        """What a process needs in its environment to use this hub, with a cache in `folder`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def n_requests(self, name: str) -> int:
        """GET requests for a file's content, redirects not counted."""
        return sum(method == "GET" and path.endswith(name) and "/cdn/" in path for method, path, _ in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def setup(self) -> None:
        super().setup()
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.server_hub
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/cdn/"):
            hub.leaked |= "Authorization" in self.headers
            owner, repo, _, name = path.removeprefix("/cdn/").split("/", 3)
            self._content(f"{owner}/{repo}", name)
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._guarded(match[1], self._info)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._guarded(match[1], self._tree)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            name = match[2]
            self._guarded(match[1], lambda repo: self._resolve(repo, name))
        else:
            self._fail(404, {})

    def _guarded(self, repo: str, answer: Callable[[str], None]) -> None:
        hub = self.server_hub
        repo = next((name for name in hub.repos if name.lower() == repo.lower()), repo)
        is_known = hub.token is not None and self.headers.get("Authorization") == f"Bearer {hub.token}"
        is_api = self.path.startswith("/api/")
        if is_api and hub.faults.api_status:
            self._fail(*hub.faults.api_status.pop(0))
        elif is_api and hub.faults.api_answer is not None:
            self._send_json(hub.faults.api_answer)
        elif "Authorization" in self.headers and hub.token is not None and not is_known:
            self._fail(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo not in hub.repos or (hub.token and not is_known and repo not in hub.gated):
            self._fail(401 if not is_known else 404, {"X-Error-Code": "RepoNotFound"})
        elif repo in hub.gated and not is_api:
            self._fail(403 if is_known else 401, {"X-Error-Code": "GatedRepo"})
        else:
            answer(repo)

    def _info(self, repo: str) -> None:
        siblings = []
        for name, stored in self.server_hub.repos[repo].items():
            lfs = {"sha256": stored.digest, "size": stored.size, "pointerSize": 130}
            siblings.append({"rfilename": name, "size": stored.size, "blobId": "0" * 40, "lfs": lfs})
        self._json({"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, repo: str) -> None:
        self._json([self._row(repo, name) for name in self.server_hub.repos[repo]])

    def _row(self, repo: str, name: str) -> dict[str, Any]:
        stored = self.server_hub.repos[repo][name]
        lfs = {"oid": stored.digest, "size": stored.size, "pointerSize": 130}
        return {"type": "file", "oid": "0" * 40, "size": stored.size, "path": name, "lfs": lfs}

    def _resolve(self, repo: str, name: str) -> None:
        stored = self.server_hub.repos[repo].get(name)
        if stored is None:
            self._fail(404, {"X-Error-Code": "EntryNotFound"})
            return
        if not self.server_hub.redirects:
            self._content(repo, name)
            return
        where = self.server_hub.faults.redirect or f"http://localhost:{self.server_hub.port}/cdn/{repo}/-/{name}"
        self.send_response(302)
        self._file_headers(stored)
        self.send_header("X-Linked-Etag", f'"{stored.digest}"')
        self.send_header("X-Linked-Size", str(stored.size))
        self.send_header("Location", quote(where, safe=":/"))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file_headers(self, stored: Stored) -> None:
        self.send_header("ETag", f'"{stored.digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")

    def _content(self, repo: str, name: str) -> None:
        faults, stored = self.server_hub.faults, self.server_hub.repos[repo][name]
        fault = faults.status.pop(0) if faults.status and self.command == "GET" else (0, {})
        if fault[0]:
            self._fail(*fault)
            return
        size, start = stored.size, 0
        end = size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not faults.ignores_ranges:
            start, end = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
            if start >= size:
                self._fail(416, {"Content-Range": f"bytes */{size}"})
                return
            self.send_response(206)
            told = faults.size_told or size
            self.send_header("Content-Range", f"bytes {start + faults.wrong_range}-{end - 1}/{told}")
        else:
            self.send_response(200)
        self._file_headers(stored)
        if faults.gzip:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            hub, line = self.server_hub, threading.get_ident()
            hub.sending.add(line)
            hub.most_lines = max(hub.most_lines, len(hub.sending))
            try:
                self._send(name, stored, start, end)
            finally:
                hub.sending.discard(line)

    def _send(self, name: str, stored: Stored, start: int, end: int) -> None:
        faults, hub = self.server_hub.faults, self.server_hub
        limit = faults.drop_after.pop(0) if faults.drop_after else end - start
        if faults.bytes_per_s is None and isinstance(stored.data, Path) and limit == end - start:
            with stored.data.open("rb") as file:
                while start < end and (
                    sent := os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)
                ):
                    start += sent
                    hub.wire[name] += sent
            return
        if faults.bytes_per_s is not None:  # little may wait on the way to a process that is about to be killed
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE // 2)
        while start < end and limit > 0:
            piece = self._piece(stored, start, min(end, start + _PIECE, start + limit))
            if faults.flip_at is not None and start <= faults.flip_at < start + len(piece):
                at = faults.flip_at - start
                piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
            self.connection.sendall(piece)
            hub.wire[name] += len(piece)
            start, limit = start + len(piece), limit - len(piece)
            if faults.bytes_per_s is not None:
                time.sleep(len(piece) / faults.bytes_per_s)
        if start < end:
            self.close_connection = True

    def _piece(self, stored: Stored, start: int, end: int) -> bytes:
        if isinstance(stored.data, bytes):
            return stored.data[start:end]
        with stored.data.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _json(self, value: Any) -> None:
        self._send_json(json.dumps(value).encode())

    def _send_json(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
