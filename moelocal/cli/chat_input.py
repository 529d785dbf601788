"""The chat's prompt: history, pasted lines as one message, completion of commands and names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.color_depth import ColorDepth
from prompt_toolkit.shortcuts import CompleteStyle

from moelocal.cli.chat_commands import COMMANDS, LEAVE_HINT, setting_names
from moelocal.cli.chat_file import saved_names, unsaved_chats

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

Read = Callable[[str], str]
_PROMPT = "> "


class Words(Completer):
    """Completes commands, and what may follow them."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """Candidates for the word before the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, space, argument = text.partition(" ")
        if not space:
            yield from _starting_with(command, list(COMMANDS))
        elif command == "/set" and " " not in argument:
            yield from _starting_with(argument, setting_names())
        elif command in ("/load", "/save") and not set(argument) & set("/\\~"):
            unsaved = list(unsaved_chats()) if command == "/load" else []
            yield from _starting_with(argument, [*unsaved, *saved_names()])
        elif command in ("/read", "/load", "/save"):
            yield from self._files.get_completions(Document(argument), event)


def _starting_with(word: str, candidates: list[str]) -> Iterable[Completion]:
    return (Completion(name, -len(word)) for name in candidates if name.startswith(word))


def open_prompt(history: Path, source: Input | None = None, sink: Output | None = None) -> Read:
    """A function that reads one message; its argument stands in the prompt already, to be edited. Ctrl-C makes the
    message empty.

    It raises EOFError at Ctrl-D. `source` and `sink` replace the terminal in tests.
    """
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # late replies of the terminal would be taken for typed text
    session: PromptSession[str] = PromptSession(
        FormattedText([("bold", _PROMPT)]),
        multiline=True,
        prompt_continuation=" " * len(_PROMPT),
        history=_history(history),
        completer=Words(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=_keys(),
        enable_open_in_editor=True,
        enable_suspend=True,
        color_depth=ColorDepth.from_env(),
        input=source,
        output=sink,
    )

    def read(draft: str) -> str:
        return session.prompt(default=draft)

    return read


def _history(path: Path) -> History:
    """The history file, readable by its owner only; in memory where it cannot be written."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return _History(str(path))
    return InMemoryHistory()


class _History(FileHistory):
    """A history that goes on in memory when the disk is full: a line typed is worth more than its record."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.app.exit(result="")
        else:
            run_in_terminal(lambda: print(LEAVE_HINT))

    return keys
