"""Bytes of tokens to text, as it streams: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextDecoder:
    """Feed it the bytes of each token; it gives the text that is certain. `stopped` is True once a stop string came:
    the text before it has then been given, the stop string and what follows is dropped."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """The text that became certain."""
        is_whole = data.isascii() and not self._utf8.getstate()[0]
        text = data.decode() if is_whole else self._utf8.decode(data)
        return self._release(text) if self._stop and text else text

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self.stopped:
            return ""
        text = held + self._utf8.decode(b"", final=True)
        cut = _first_stop(text, self._stop)
        if cut < 0:
            return text
        self.stopped = True
        return text[:cut]

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        cut = _first_stop(text, self._stop)
        if cut >= 0:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _first_stop(text: str, stops: Sequence[str]) -> int:
    """Index of the earliest stop string in the text, -1 if there is none."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=-1)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
