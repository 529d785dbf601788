"""Texts that a model is run on, to be watched: a file, standard input, or the built-in passages."""

from __future__ import annotations

import sys
from pathlib import Path

from moelocal.errors import BadRequest
from moelocal.measure.routing import Passage, built_in

_MOST_TEXT_BYTES = 16 << 20


def passages(text: str | None) -> list[Passage]:
    """The text as typed, else what is piped in, else the built-in passages.

    Raises:
        BadRequest: it is missing, empty or binary.
    """
    if text is not None:
        return [passage(text)]
    if sys.stdin is not None and not sys.stdin.isatty() and (piped := _read("-")).strip():
        return [_checked("standard input", piped)]
    return built_in()


def passage(file: str) -> Passage:
    """A file, or `-` for standard input.

    Raises:
        BadRequest: see `passages`.
    """
    return _checked("standard input" if file == "-" else Path(file).name, _read(file))


def _read(file: str) -> str:
    from moelocal.cli.opening import read_text
    from moelocal.paths import user_path

    if file != "-":
        return read_text(user_path(file), "text", _MOST_TEXT_BYTES)
    from moelocal.cli.run import _read_stdin

    return "" if sys.stdin is None else _read_stdin()


def _checked(name: str, text: str) -> Passage:
    if not text.strip():
        raise BadRequest(
            f"The text from {name} is empty.", "Give one with content, or leave it out: built-in ones run."
        )
    if "\0" in text:
        raise BadRequest(f"{name} holds NUL characters, so it is binary data.", "Give a text in UTF-8.")
    return Passage(name, text)
