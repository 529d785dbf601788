"""The rows at the bottom of a terminal that may still change, above them everything that is final.

A normal terminal, no alternate screen: final rows scroll away for good, live rows are rewritten in place, only where
they changed, inside a synchronized update. Rows come in rendered to the terminal's width; nothing here knows Markdown.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

_CONTROL = re.compile(  # and what turns the direction of the text after it, so that it reads as another
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def harmless(text: str) -> str:
    """`text` without anything a terminal obeys: line feeds and tabs stay, carriage returns go, others are shown."""
    return _CONTROL.sub(_picture, text.replace("\r", ""))


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


def forget_typed() -> None:
    """Drops what was typed before a question was asked: it cannot be an answer to it."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # no terminal; another system
        import termios

        with contextlib.suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


def is_dumb() -> bool:
    """Whether the terminal cannot move its cursor."""
    return os.environ.get("TERM", "" if os.name == "nt" else "dumb") in ("dumb", "unknown")


class Row(NamedTuple):
    """One row of the screen: `text` as seen, without trailing spaces, and `ansi` as written."""

    text: str
    ansi: str


BLANK = Row("", "")


class Screen:
    """Writes rows to a terminal whose cursor rests at the start of the row below the live ones."""

    def __init__(self, out: TextIO, cells: Callable[[str], int]) -> None:
        self._out = out
        self._cells = cells
        self._live: list[Row] = []
        self.width, self.height = self._measure()

    def _measure(self) -> tuple[int, int]:
        width, height = os.get_terminal_size(self._out.fileno())
        return max(width, 4) if width else 80, max(height, 2) if height else 24

    def draw(self, final: Sequence[Row], live: Sequence[Row] = ()) -> None:
        """Replaces the live rows by `final`, never touched again, and `live`, at most `height - 1` of them."""
        old, new = self._live, [*final, *live]
        same = 0
        while same < min(len(old), len(new)) and old[same] == new[same]:
            same += 1
        self._live = list(live)
        if len(old) == len(new) == same and live:
            return
        out = ["\x1b[?2026h\r"]
        if len(old) > same:
            out.append(f"\x1b[{len(old) - same}A")
        for i in range(same, len(new)):
            if i >= len(old) or old[i] != new[i]:
                # Cleared first: at the last column, clearing after the text would eat its last character. A final row
                # may wrap where terminal and we disagree about a character's width; a live one must stay one row.
                wrap = i < len(final)
                out.append(f"\x1b[K{new[i].ansi}" if wrap else f"\x1b[K\x1b[?7l{new[i].ansi}\x1b[?7h")
            out.append("\r\n")
        out.append("\x1b[J\x1b[?2026l")
        self._out.write("".join(out))
        self._out.flush()

    def refit(self) -> list[Row] | None:
        """Adapts to a resized window: None when the size is the same, else the live rows are wiped, and those are
        returned that went up into the scrollback, out of reach."""
        width, height = self._measure()
        if (width, height) == (self.width, self.height):
            return None
        rows = [self._n_rows(row, width) for row in self._live]
        self.width, self.height = width, height
        lost = 0
        while sum(rows[lost:]) > height - 1:
            lost += 1
        up = sum(rows[lost:])
        self._out.write("\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J")
        gone, self._live = self._live[:lost], []
        return gone

    def _n_rows(self, row: Row, width: int) -> int:
        """How many rows of the narrower window a row takes, if the terminal wraps what it shows already."""
        return max(1, -(-self._cells(row.text) // width)) if width < self.width and _reflows() else 1


def _reflows() -> bool:
    """Whether a resize wraps old rows anew, as nearly every terminal does; these leave them cut off."""
    env = os.environ
    return "TMUX" in env or not ("XTERM_VERSION" in env or "STY" in env or env.get("TERM") == "linux")


def _keyboard() -> int | None:
    """The descriptor of the terminal that keys come from, if it is this job's: a background one is stopped when it
    touches the settings."""
    try:
        fd = sys.stdin.fileno()
        return fd if os.name != "nt" and os.tcgetpgrp(fd) == os.getpgrp() else None
    except (AttributeError, OSError):  # no stdin at all, or not a terminal
        return None


@contextlib.contextmanager
def quiet_keys() -> Iterator[None]:
    """Keys typed meanwhile are not echoed into the rows; they stay queued for the next prompt. Ctrl-C works."""
    fd = _keyboard()
    if fd is None:
        yield
        return
    import termios

    before = termios.tcgetattr(fd)
    quiet = termios.tcgetattr(fd)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may have vanished
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
