"""Byte ranges of a file on the hub, over a line that may drop and from servers that may not do as they say."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from moelocal.model.client import (
    RETRIED,
    HubError,
    client,
    endpoint,
    headers,
    http,
    pause_s,
    refusal,
    unreachable,
)
from moelocal.model.hub import HubFile

_TRIES = 6  # without a single byte between them
_TIMEOUT_S = 30.0  # without a byte
_MOST_SKIPPED_BYTES = 32 << 20  # of a server that sends from the beginning whatever is asked for
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class RemoteFile:
    """One file of a repository at one commit. May be read by several threads at once."""

    def __init__(self, repo: str, commit: str, file: HubFile) -> None:
        self.repo = repo
        self.file = file
        self._url = f"{endpoint()}/{repo}/resolve/{commit}/{quote(file.path)}"
        self._where: str | None = None  # where the hub sends to; such an address is good for some minutes
        self._headers = headers()
        self.stop = threading.Event()
        self.is_known = False
        self.sends_parts = True

    def probe(self) -> None:
        """Asks for the first byte, to learn where the file is and whether that server sends parts of it."""
        self.read(0, 1)
        self.is_known = True

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, not included."""
        return b"".join(self.pieces(start, end))

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, not included, as they come. A dropped line is taken up again.

        Raises:
            HubError: the server refuses, does not send these bytes, or cannot be reached for a while.
        """
        attempt = 0
        while start < end and not self.stop.is_set():
            failure, wait_s = None, 0.0
            try:
                for piece in self._request(start, end):
                    start, attempt = start + len(piece), 0
                    yield piece
                if start < end:
                    failure = HubError(f"{self._shown} ended at byte {start:,} of {end:,}.", "Try again later.")
            except _Refused as error:
                if error.status not in RETRIED and not error.has_expired:
                    raise refusal(self.repo, error.response) from error
                failure, wait_s = refusal(self.repo, error.response), pause_s(attempt, error.response.headers)
            except (http().TooManyRedirects, http().UnsupportedProtocol, http().InvalidURL) as error:
                raise unreachable(error) from error
            except http().HTTPError as error:
                failure = unreachable(error)
            if failure is not None and start < end:
                attempt += 1
                if attempt == _TRIES:
                    raise failure
                self._where = None
                self.stop.wait(wait_s or pause_s(attempt - 1, {}))

    @property
    def _shown(self) -> str:
        return f"The answer for {self.file.path.rpartition('/')[2]}"

    def _request(self, start: int, end: int) -> Iterator[bytes]:
        """Sends one request and yields what is wanted of its answer."""
        url = self._where or self._url
        sent = {**self._headers, "Range": f"bytes={start}-{end - 1}"}
        if _origin(url) != _origin(self._url):
            sent = {key: value for key, value in sent.items() if key.lower() != "authorization"}
        with client().stream("GET", url, headers=sent, timeout=_TIMEOUT_S, follow_redirects=True) as response:
            if response.status_code not in (200, 206):
                raise _Refused(response, url != self._url)
            if str(response.url) != self._url:
                self._where = str(response.url)
            skipped = self._check(response, start, end)
            left = end - start
            for piece in response.iter_raw():
                if skipped:
                    piece, skipped = piece[skipped:], max(0, skipped - len(piece))
                if piece:
                    yield piece[:left]
                    left -= len(piece)
                if left < 0 or (left == 0 and response.status_code == 200):
                    return  # the rest of the answer is not wanted; one that is read to its end leaves its line open

    def _check(self, response: Any, start: int, end: int) -> int:
        """How many bytes at the beginning of an answer are not wanted."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise HubError(f"{self._shown} is packed ({encoding}), so its bytes cannot be told.", "Check the proxy.")
        if response.status_code == 206:
            told = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if told is None or int(told[1]) != start or int(told[2]) < start:
                raise HubError(
                    f"{self._shown} holds other bytes than those asked for.", "Check HF_ENDPOINT and the proxy."
                )
            self._check_length(told[3])
            return 0
        self.sends_parts = False
        self._check_length(response.headers.get("Content-Length", "*"))
        if start > _MOST_SKIPPED_BYTES:
            raise HubError(
                f"{self._shown} starts at its first byte: this server cannot send a part of a file.",
                "Check HF_ENDPOINT and the proxy.",
            )
        return start

    def _check_length(self, told: str) -> None:
        if told != "*" and told.isdecimal() and int(told) != self.file.n_bytes:
            raise HubError(
                f"{self.file.path.rpartition('/')[2]} has {int(told):,} bytes by its server, but"
                f" {self.file.n_bytes:,} by the hub's list.",
                "The repository is being changed, or a proxy answers: try again later.",
            )


class _Refused(Exception):
    """A status that is no success. `has_expired`: it came from an address that the hub gave a while ago."""

    def __init__(self, response: Any, was_given: bool) -> None:
        super().__init__(response.status_code)
        self.response = response
        self.status = int(response.status_code)
        self.has_expired = was_given and self.status in (400, 401, 403, 404, 410)


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
