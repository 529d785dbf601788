"""What the program itself says, on stderr: errors, notes, figures. Needs no rich, since every command needs it."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from moelocal.cli.screen import harmless, is_dumb
from moelocal.errors import MoelocalError
from moelocal.units import format_rate, format_seconds

if TYPE_CHECKING:
    from moelocal.engine.timings import Timings


_COMMANDS = "bench|chat|convert|doctor|eval|experts|imatrix|list|plan|prune|pull|quantize|rm|run|serve|show|tune|worker"
_COMMAND = re.compile(rf"(?<![\w/.-])moelocal(?= (?:{_COMMANDS})\b)")
_BOLD_RED, _DIM, _RESET = "\x1b[1;31m", "\x1b[2m", "\x1b[0m"


def program() -> str:
    """What was typed to start this program: `moelocal`, or its path where the shell would not find that."""
    typed = os.environ.get("MOELOCAL_COMMAND") or sys.argv[0]
    folder, name = os.path.split(typed)
    if name == "__main__.py" and os.path.basename(folder) == "moelocal":
        return f"{os.path.basename(sys.executable)} -m moelocal"
    is_found = folder in os.environ.get("PATH", "").split(os.pathsep)
    return typed if name == "moelocal" and folder and not is_found else "moelocal"


def as_typed(text: str) -> str:
    """`text` whose commands, such as `moelocal doctor`, can be typed as they are."""
    return _COMMAND.sub(program().replace("\\", r"\\"), text)


def error(failure: MoelocalError) -> None:
    """An expected failure: what failed, llama.cpp's last words if it spoke, what to do next."""
    text = wrapped(f"Error: {harmless(failure.message)}")
    _write(_styled("Error:", _BOLD_RED) + text.removeprefix("Error:"))
    for line in failure.details:
        dim(f"  llama.cpp: {line.strip()}")
    if failure.hint:
        note(failure.hint)


def note(message: str) -> None:
    """Something good to know."""
    _write(wrapped(harmless(as_typed(message))))


def dim(message: str) -> None:
    """Statistics and other small print."""
    _write(_styled(wrapped(harmless(message)), _DIM))


def wrapped(text: str) -> str:
    """Lines broken between words at the terminal's width; as they are when stderr is no terminal."""
    if not sys.stderr.isatty():
        return text
    import shutil
    import textwrap

    width = max(20, shutil.get_terminal_size().columns - 1)
    lines: list[str] = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return "\n".join(lines)


def _styled(text: str, style: str) -> str:
    plain = os.environ.get("NO_COLOR") or is_dumb() or not sys.stderr.isatty()
    return text if plain else f"{style}{text}{_RESET}"


def _write(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def stats_line(timings: Timings) -> str:
    """`prefill 512 tokens 205.3/s, decode 88 tokens 43.8/s, first token 2.6 s`; what was not measured is left out."""
    n_new = timings.prompt_tokens - timings.cached_tokens
    cached = f" ({timings.cached_tokens} cached)" if timings.cached_tokens else ""
    parts = [f"prefill {_tokens(n_new)}{cached}{_rate(timings.prompt_per_s)}"]
    parts.append(f"decode {_tokens(timings.generated_tokens)}{_rate(timings.generate_per_s)}")
    if timings.generated_tokens:
        parts.append(f"first token {format_seconds(timings.first_token_s)}")
    return ", ".join(parts)


def _tokens(n: int) -> str:
    return f"{n} token" if n == 1 else f"{n} tokens"


def _rate(per_s: float | None) -> str:
    return f" {format_rate(per_s)}" if per_s else ""
