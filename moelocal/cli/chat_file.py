"""Conversations on disk: versioned JSON, written atomically; the KV cache lies beside it under the same name.

Those with a name lie in the chats folder. Every chat also keeps what has no name yet, each conversation in a file of
its own: two chats at once never write the same one, and the last ten are there to be loaded.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import localtime, strftime, time_ns
from typing import Any

from moelocal.engine.prompt import Message
from moelocal.engine.sampling import Sampling
from moelocal.errors import MoelocalError
from moelocal.paths import user_home, user_path

_N_UNSAVED = 10
_FORMAT, _VERSION = "moelocal-chat", 1
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """A conversation as it is stored. `interrupted`: indices of messages that Ctrl-C cut short."""

    model: str
    system: str | None
    messages: tuple[Message, ...]
    interrupted: frozenset[int]
    sampling: Sampling


def chat_path(name: str) -> Path:
    """The file of a conversation: a name lies in the chats folder; with a slash in it, it is a path.

    Raises:
        MoelocalError: not a usable name.
    """
    if not name.isprintable() or name.strip(". ") == "":
        raise MoelocalError(f"{name!r} is not a usable name.", "For instance: /save trip, or /save ~/notes/trip.json")
    path = user_path(name)
    if path.name in ("", "..") or name.endswith("/"):
        raise MoelocalError(f"{name!r} is a folder.", f"Name a file in it: {name.rstrip('/')}/trip.json")
    if path.suffix.lower() != ".json":
        path = path.with_name(path.name + ".json")
    return path if {"/", os.sep} & set(name) or name.startswith("~") else chats_folder() / path


def chats_folder() -> Path:
    """Where conversations with bare names are."""
    return user_home() / "chats"


def saved_names() -> list[str]:
    """Names of the saved conversations, newest first."""
    with suppress(OSError):
        files = [(path.stat().st_mtime, path.stem) for path in chats_folder().glob("*.json")]
        return [name for _, name in sorted(files, reverse=True)]
    return []


def unsaved_chats(own: Path | None = None) -> dict[str, Path]:
    """Conversations without a name of other chats than `own`, newest first: previous, previous-2 and so on."""
    with suppress(OSError):
        files = [(path.stat().st_mtime, path) for path in (chats_folder() / "unsaved").glob("*.json") if path != own]
        newest = sorted(files, reverse=True)
        return {f"previous-{n}" if n > 1 else "previous": path for n, (_, path) in enumerate(newest, 1)}
    return {}


def is_unsaved_name(name: str) -> bool:
    """Whether `unsaved_chats` gives such names."""
    return re.fullmatch(r"previous(-\d+)?", name.lower()) is not None


def new_unsaved_path() -> Path:
    """A file for a conversation without a name; the oldest of the others make room for it."""
    for path in list(unsaved_chats().values())[_N_UNSAVED:]:
        with suppress(OSError):
            path.unlink()
    return chats_folder() / "unsaved" / f"{strftime('%Y-%m-%d-%H%M%S')}-{time_ns() % 10**9:09}.json"


def stamp(path: Path) -> tuple[Path, int] | None:
    """A file and when it was written, to see whether it is still the same; None if it is not there."""
    try:
        return path, path.stat().st_mtime_ns
    except OSError:
        return None


def summary(name: str, path: Path) -> str:
    """One line about a stored conversation: name, when, how long, how it began."""
    try:
        saved = read_chat(path)
        when = strftime("%Y-%m-%d %H:%M", localtime(path.stat().st_mtime))
    except (OSError, MoelocalError):
        return f"{name:12}  cannot be loaded: /load {name} tells why"
    questions = [message.content for message in saved.messages if message.role == "user"]
    turns = "1 turn" if len(questions) == 1 else f"{len(questions)} turns"
    return f"{name:12}  {when}  {turns:>8}  {' '.join(''.join(questions[:1]).split())[:40]}"


def write_chat(saved: Saved, path: Path) -> None:
    """Writes the JSON; the file is either the old or the new one, never half of it.

    Raises:
        MoelocalError: the folder or disk cannot take it.
    """
    messages = [
        {"role": message.role, "content": message.content}
        | ({"reasoning": message.reasoning} if message.reasoning else {})
        | ({"interrupted": True} if at in saved.interrupted else {})
        for at, message in enumerate(saved.messages)
    ]
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": saved.model,
        "system": saved.system,
        "sampling": asdict(saved.sampling),
        "messages": messages,
    }
    data = json.dumps(document, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    try:
        _write_atomically(data, path)
    except OSError as error:
        raise MoelocalError(
            f"The conversation could not be saved to {path}: {error.strerror or error}.", "Another place: /save PATH"
        ) from error


def _write_atomically(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def read_chat(path: Path) -> Saved:
    """Reads what `write_chat` wrote.

    Raises:
        MoelocalError: missing, unreadable, or not a conversation, and where it is wrong.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        names = saved_names()
        hint = f"There are: {', '.join(names[:8])}" if names else "/save NAME keeps this one."
        raise MoelocalError(f"There is no saved conversation {path}.", hint) from error
    except OSError as error:
        raise MoelocalError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(data) > _MAX_BYTES:
        raise _bad(path, f"it is larger than {_MAX_BYTES >> 20} MiB")
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _bad(path, f"not UTF-8 text at byte {error.start}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _bad(path, f"not JSON ({error})") from error
    return _checked(document, path)


def _bad(path: Path, why: str) -> MoelocalError:
    return MoelocalError(f"{path} is not a saved conversation: {why}.", "/load lists those that are.")


def _checked(document: Any, path: Path) -> Saved:
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise _bad(path, f'"format" is not "{_FORMAT}"')
    if document.get("version") != _VERSION:
        raise MoelocalError(
            f"{path} has version {document.get('version')!r}; this program reads version {_VERSION}.",
            "Update moelocal.",
        )
    system = document.get("system")
    if not isinstance(system, str | None):
        raise _bad(path, '"system" is not a text')
    entries = document.get("messages")
    if not isinstance(entries, list):
        raise _bad(path, '"messages" is not a list')
    messages = tuple(_message(entry, f"messages[{at}]", path) for at, entry in enumerate(entries))
    if messages and messages[0].role != "user":
        raise _bad(path, "messages[0] is not the user's")
    interrupted = frozenset(at for at, entry in enumerate(entries) if entry.get("interrupted") is True)
    return Saved(str(document.get("model", "")), system, messages, interrupted, _sampling(document, path))


def _message(entry: Any, where: str, path: Path) -> Message:
    if not isinstance(entry, dict):
        raise _bad(path, f"{where} is not an object")
    role, content, reasoning = entry.get("role"), entry.get("content"), entry.get("reasoning", "")
    if role not in ("user", "assistant"):
        raise _bad(path, f"{where}.role is {role!r}, not user or assistant")
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise _bad(path, f"{where}.{'reasoning' if isinstance(content, str) else 'content'} is not a text")
    return Message(role, content, reasoning)


def _sampling(document: dict[str, Any], path: Path) -> Sampling:
    """The stored settings; those that this version does not know are left out."""
    stored = document.get("sampling", {})
    if not isinstance(stored, dict):
        raise _bad(path, '"sampling" is not an object')
    values: dict[str, Any] = {}
    for known in fields(Sampling):
        if known.name not in stored:
            continue
        value = stored[known.name]
        if known.name == "stop":
            value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, known.default, known.name):
            raise _bad(path, f"sampling.{known.name} is {value!r}")
        values[known.name] = value
    try:
        return Sampling(**values)
    except MoelocalError as error:
        raise _bad(path, f"sampling: {error.message.rstrip('.')}") from error


def _fits(value: Any, default: Any, name: str) -> bool:
    if name in ("max_tokens", "seed"):
        return value is None or type(value) is int
    if name == "stop":
        return isinstance(value, tuple) and all(isinstance(text, str) for text in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


def last_model() -> str:
    """The model that the last chat was with; at first the bundled one."""
    try:
        reference = os.fsdecode((user_home() / "last-model").read_bytes()).strip("\r\n")
    except (OSError, UnicodeDecodeError):
        return "demo"
    return reference if reference and "\0" not in reference else "demo"


def remember_model(reference: str) -> None:
    """Notes the model for the next `chat` without one; not being able to is no reason to complain."""
    path = user_path(reference)
    if reference != "demo" and path.is_file():
        reference = str(path.resolve())
    with suppress(OSError, MoelocalError):
        _write_atomically(os.fsencode(f"{reference}\n"), user_home() / "last-model")
