"""The chat's commands: a line that begins with / in, what to say and to do next out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from time import strftime
from typing import Any, Literal

from moelocal.cli.chat_file import (
    Saved,
    chat_path,
    is_unsaved_name,
    read_chat,
    saved_names,
    stamp,
    summary,
    unsaved_chats,
    write_chat,
)
from moelocal.cli.chat_state import Chat
from moelocal.engine.sampling import Sampling
from moelocal.errors import BadRequest, MoelocalError
from moelocal.paths import user_path
from moelocal.units import format_bytes, format_rate

LEAVE_HINT = "Ctrl-D leaves the chat."
_MAX_FILE_BYTES = 4 << 20
_ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}
_OFF = ("off", "none", "no", "false")
_ON = ("on", "yes", "true")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command leads to: `say` is shown, then the prompt comes back (with `draft` in it), an answer is made, the
    last turn is shown, or the chat ends."""

    say: str = ""
    then: Literal["prompt", "answer", "show", "exit"] = "prompt"
    draft: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `argument` is how /help writes what follows its name."""

    argument: str
    help: str
    run: Callable[[Chat, str], Outcome]


def is_command(line: str) -> bool:
    """Whether a message is meant as a command: /word, not a path; a leading space makes it a message."""
    return re.match(r"/[A-Za-z?]*(?:\s|$)", line) is not None


def run_command(chat: Chat, line: str) -> Outcome:
    """Runs a command.

    Raises:
        MoelocalError: it is unknown or cannot be done; nothing has changed.
    """
    name, argument = (*line.split(maxsplit=1), "")[:2]
    argument = argument.rstrip()
    name = _ALIASES.get(name.lower(), name.lower())
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, 1)
        hint = (
            f"Did you mean {near[0]}?"
            if near
            else "/help lists the commands; a space before the / sends the line as it is."
        )
        raise BadRequest(f"There is no command {name}.", hint)
    if argument and not command.argument:
        raise BadRequest(f"{name} takes nothing after it.", "A space before the / sends the line as a message.")
    return command.run(chat, argument)


def _help(chat: Chat, argument: str) -> Outcome:
    width = max(len(f"{name} {command.argument}") for name, command in COMMANDS.items())
    lines = [f"{f'{name} {command.argument}':{width}}  {command.help}" for name, command in COMMANDS.items()]
    names = "A NAME with a / in it is a path; others are kept by moelocal. /save NAME! replaces another conversation."
    keys = "Enter sends, Alt-Enter begins a new line. Ctrl-C stops an answer or clears the line, Ctrl-D leaves."
    return Outcome("\n".join([*lines, names, keys]))


def _clear(chat: Chat, argument: str) -> Outcome:
    where = "; /load previous brings the conversation back" if chat.kept_in else ""
    chat.clear()
    return Outcome(f"Begun anew. The system message and the settings stay{where}.")


def _regen(chat: Chat, argument: str) -> Outcome:
    if not chat.again():
        raise BadRequest("There is no message to answer yet.", "Type one.")
    same = chat.sampling.temperature == 0
    return Outcome(
        "At temperature 0 the answer is the same again; /set temperature 0.8 varies it." if same else "", "answer"
    )


def _edit(chat: Chat, argument: str) -> Outcome:
    draft = chat.edit()
    if draft is None:
        raise BadRequest("There is no message to edit yet.", "Type one.")
    return Outcome("", "prompt", draft)


def _system(chat: Chat, argument: str) -> Outcome:
    if not argument:
        return Outcome(f"System message: {chat.system}" if chat.system else "There is no system message.")
    chat.system = None if argument.lower() in _OFF else argument
    return Outcome(
        "System message set; it holds from the next answer on." if chat.system else "No system message any more."
    )


def _stats(chat: Chat, argument: str) -> Outcome:
    totals, used, n_ctx = chat.totals, len(chat.session.cached), chat.session.n_ctx
    left_out = f", the {chat.n_left_out} oldest left out" if chat.n_left_out else ""
    prefill = totals.computed / totals.prompt_s if totals.prompt_s else None
    decode = totals.decodes / totals.generate_s if totals.generate_s else None
    return Outcome(
        f"context  {used:,} of {n_ctx:,} tokens ({used / n_ctx:.0%})\n"
        f"turns    {chat.n_turns()}{left_out}\n"
        f"prefill  {totals.computed:,} tokens, {format_rate(prefill)}; {totals.cached:,} more were cached\n"
        f"decode   {totals.generated:,} tokens, {format_rate(decode)}" + _disk_line(chat)
    )


def _disk_line(chat: Chat) -> str:
    """What came from the disk, for a model larger than RAM."""
    if chat.session.residency is None:
        return ""
    seen = chat.session.residency.stats
    if not seen.n_tokens:
        return "\nexperts  streamed from the disk; nothing generated yet"
    n_bytes = format_bytes(int(seen.bytes_per_token))
    lossy = f"; {seen.n_replaced:,} choices were replaced (lossy)" if chat.session.plan.lossy_misses else ""
    return f"\nexperts  {seen.hit_rate:.0%} were in RAM when chosen, {n_bytes} read from the disk per token{lossy}"


def _save(chat: Chat, argument: str) -> Outcome:
    name = argument.removesuffix("!").rstrip()
    if is_unsaved_name(name):
        raise BadRequest(f"{name} is what an earlier chat is called.", "Choose another name: /save trip")
    path = chat_path(name or strftime("%Y-%m-%d-%H%M%S")).absolute()
    if stamp(path) not in (None, chat.saved_as) and not argument.endswith("!"):
        raise BadRequest(f"{path} is there already.", f"To replace it: /save {name}!  Or choose another name.")
    write_chat(snapshot(chat), path)
    chat.saved_as = stamp(path)
    if chat.kept_in is not None:
        with suppress(OSError):
            chat.kept_in.unlink()
        chat.kept_in = None
    mask = os.umask(0o077)  # it holds what was said, as the JSON does
    try:
        n_bytes = chat.session.save_state(path.with_suffix(".kv"))
    except MoelocalError as error:
        return Outcome(f"Saved: {path}. {error.message} /load will read the conversation anew.")
    finally:
        os.umask(mask)
    cache = f", and {format_bytes(n_bytes)} of KV cache, so that /load continues at once" if n_bytes else ""
    return Outcome(f"Saved: {path}{cache}.")


def snapshot(chat: Chat) -> Saved:
    """The conversation as it is stored."""
    return Saved(chat.model, chat.system, tuple(chat.messages), frozenset(chat.interrupted), chat.sampling)


def _load(chat: Chat, argument: str) -> Outcome:
    if not argument:
        return Outcome(_stored(chat) or "Nothing is saved yet: /save NAME")
    unsaved = unsaved_chats(chat.kept_in).get(argument.lower())
    path = unsaved or chat_path(argument).absolute()
    now = stamp(path)
    saved = read_chat(path)
    cache = path.with_suffix(".kv")
    restored = chat.session.load_state(cache) if cache.is_file() else 0  # first: it may fail or be interrupted
    chat.clear()
    chat.messages, chat.interrupted = list(saved.messages), set(saved.interrupted)
    chat.system, chat.sampling = saved.system, saved.sampling
    chat.saved_as = None if unsaved else now
    unanswered = chat.settle()
    turns = "1 turn" if chat.n_turns() == 1 else f"{chat.n_turns()} turns"
    parts = [f"Loaded {argument if unsaved else path.stem}: {turns}"]
    if restored:
        parts.append(f"{restored:,} tokens still computed")
    if saved.model and saved.model != chat.model:
        parts.append(f"begun with {saved.model}")
    return Outcome(", ".join(parts) + ".", "show", unanswered)


def _stored(chat: Chat) -> str:
    """All conversations that /load can load, a line for each."""
    groups = {
        "Saved:": {name: chat_path(name) for name in saved_names()},
        "Not saved, of earlier chats:": unsaved_chats(chat.kept_in),
    }
    return "\n".join(
        "\n  ".join([title, *(summary(name, path) for name, path in stored.items())])
        for title, stored in groups.items()
        if stored
    )


def _read(chat: Chat, argument: str) -> Outcome:
    if not argument:
        raise BadRequest("Which file?", "For instance: /read notes.txt")
    path = user_path(argument.strip("'\""))
    text = _file_text(path)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    newline = "" if text.endswith("\n") else "\n"
    attached = f"{path.name}:\n{fence}{path.suffix[1:]}\n{text}{newline}{fence}"
    n_tokens = len(chat.session.tokenize(attached, special=False))
    if n_tokens >= chat.session.n_ctx:
        raise BadRequest(
            f"{path} has {n_tokens:,} tokens, the context holds {chat.session.n_ctx:,}.",
            f"Start with a longer context: moelocal chat --ctx {(n_tokens // 1024 + 2) * 1024}",
        )
    chat.attached.append(attached)
    return Outcome(f"{path.name} ({n_tokens:,} tokens) goes with your next message.")


def _file_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadRequest(
            f"{path} cannot be read: {error.strerror or error}.", "Check the path; Tab completes it."
        ) from error
    if len(data) > _MAX_FILE_BYTES:
        raise BadRequest(f"{path} is larger than {format_bytes(_MAX_FILE_BYTES)}.", "Give a part of it.")
    if b"\0" in data:
        raise BadRequest(f"{path} is not a text file.", "Only text can be read.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text (byte {error.start}).", "Convert it to UTF-8 first.") from error
    if not text.strip():
        raise BadRequest(f"{path} is empty.", "Give a file with content.")
    return text


def _exit(chat: Chat, argument: str) -> Outcome:
    return Outcome(then="exit")


# -- settings ----------------------------------------------------------------------------------------------------------


def setting_names() -> list[str]:
    """What /set knows."""
    return [field.name for field in fields(Sampling)] + ["hide_reasoning"]


def _set(chat: Chat, argument: str) -> Outcome:
    if not argument:
        return Outcome("\n".join(f"{name:18} {_shown(chat, name)}" for name in setting_names()))
    written, _, value = argument.partition(" ")
    name = _setting(written.replace("-", "_").rstrip("=").lower())
    value = value.strip().removeprefix("=").strip()
    if not value:
        return Outcome(f"{name} {_shown(chat, name)}")
    if name == "hide_reasoning":
        chat.hide_reasoning = _switch(name, value)
    else:
        parsed = getattr(chat.initial, name) if value.lower() == "default" else _parsed(name, value)
        try:
            changed = replace(chat.sampling, **{name: parsed})
        except BadRequest as error:
            raise BadRequest(error.message.removeprefix("--"), "/set shows all values.") from error
        if name == "grammar":
            chat.session.check(changed)
        chat.sampling = changed
    return Outcome(f"{name} {_shown(chat, name)}")


def _shown(chat: Chat, name: str) -> str:
    value = chat.hide_reasoning if name == "hide_reasoning" else getattr(chat.sampling, name)
    if isinstance(value, bool):
        return "on" if value else "off"
    if name == "seed" and value is None:
        return "a new one each time"
    if isinstance(value, tuple):
        return " ".join(repr(text) for text in value) or "none"
    return "none" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def _setting(written: str) -> str:
    names = setting_names()
    matches = [name for name in names if name == written] or [name for name in names if name.startswith(written)]
    if len(matches) == 1:
        return matches[0]
    near = matches or get_close_matches(written, names, 3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "/set shows all settings."
    raise BadRequest(
        f"There is no setting {written}." if not matches else f"{written} could be several settings.", hint
    )


def _parsed(name: str, value: str) -> Any:
    """A setting's value as typed.

    Raises:
        BadRequest: not of the kind that the setting takes.
    """
    default = getattr(Sampling(), name)
    if name == "stop":
        return () if value.lower() in _OFF else (value.replace("\\n", "\n"),)
    if name == "grammar":
        return "" if value.lower() in _OFF else _file_text(user_path(value))
    if isinstance(default, bool):
        return _switch(name, value)
    if default is None and value.lower() in (*_OFF, "random"):
        return None
    kind: type[int] | type[float] = float if isinstance(default, float) else int
    try:
        return kind(value.replace(",", ".") if kind is float else value)
    except (ValueError, OverflowError) as error:
        example = {"max_tokens": 256, "seed": 42}.get(name, default)
        what = "a number" if kind is float else "a whole number"
        raise BadRequest(f"{name} takes {what}, not {value!r}.", f"For instance: /set {name} {example}") from error


def _switch(name: str, value: str) -> bool:
    if value.lower() not in _ON + _OFF:
        raise BadRequest(f"{name} is on or off, not {value!r}.", f"For instance: /set {name} on")
    return value.lower() in _ON


COMMANDS: dict[str, Command] = {
    "/help": Command("", "this list", _help),
    "/clear": Command("", "begin a new conversation", _clear),
    "/regen": Command("", "answer the last message again", _regen),
    "/edit": Command("", "change the last message and answer it anew", _edit),
    "/system": Command("[TEXT]", "show or set the system message; off removes it", _system),
    "/set": Command("[NAME VALUE]", "show or change temperature, top_k, seed, hide_reasoning ...", _set),
    "/stats": Command("", "context, cache and speeds", _stats),
    "/save": Command("[NAME]", "keep the conversation under a name", _save),
    "/load": Command("[NAME]", "continue a kept one; alone it lists them; previous is the chat before this one", _load),
    "/read": Command("FILE", "put a text file into the next message", _read),
    "/exit": Command("", "leave, as Ctrl-D does", _exit),
}
