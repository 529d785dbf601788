"""The `moelocal` command: its subcommands, and the one place where errors become messages and exit statuses.

Exit status: 0 done, 1 expected failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from moelocal import __version__
from moelocal.cli import messages
from moelocal.cli.options import expand
from moelocal.errors import MoelocalError

COMMANDS = {
    "doctor": "doctor",
    "pull": "pull",
    "list": "listing",
    "show": "show",
    "rm": "remove",
    "run": "run",
    "chat": "chat",
    "plan": "plan",
    "bench": "bench",
    "tune": "tune",
    "experts": "experts",
    "eval": "evaluate",
    "convert": "convert",
    "quantize": "quantize",
    "imatrix": "imatrix",
    "prune": "prune",
    "worker": "worker",
}
"""In the order of `--help`: each with its module, which has a function of the same name."""

_HELP = """Run Mixture-of-Experts models larger than your graphics card.

Try it at once, offline: moelocal run demo "What is a mixture of experts?"
"""


def command_line(*names: str) -> typer.Typer:
    """The program with these commands, by default all: to run one, the others need not be imported."""
    app = typer.Typer(
        name="moelocal",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=messages.as_typed(_HELP))(_root)
    for name in names or COMMANDS:
        module = COMMANDS[name]
        command = getattr(importlib.import_module(f"moelocal.cli.{module}"), module)
        app.command(name, cls=_Command)(bounded(expand(command)))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"moelocal {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What the program takes without a command."""


class _Command(TyperCommand):
    """A command that tells what was probably meant when it is used wrongly."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.Exit:
            raise
        except Exception as caught:
            error: Any = caught  # of a class that Typer keeps to itself
            if hasattr(error, "possibilities"):
                error.possibilities = None
                if close := _close(error.option_name, [name for param in self.params for name in param.opts]):
                    error.message += f". Did you mean {' or '.join(close)}?"
            elif "unexpected extra argument" in getattr(error, "message", "") and "prompt" in ctx.params:
                error.message += f'. Put the prompt in quotes: {messages.program()} {self.name} MODEL "several words"'
            raise


def _close(typed: str, names: list[str]) -> list[str]:
    """The options that may be meant by one that there is not: those with a common beginning, else those that contain
    it, else those spelled alike; at most three."""
    word = typed.lstrip("-").replace("_", "-").lower()
    options = {name.lstrip("-"): name for name in names if name.startswith("--")}
    found = [name for name in options if name.startswith(word) or word.startswith(name)]
    found = found or [name for name in options if len(word) > 2 and word in name]
    return [options[name] for name in found or get_close_matches(word, options)][:3]


def bounded(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command in the error boundary: expected errors become a message and an exit status, never a traceback."""

    @functools.wraps(command)
    def inner(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except MoelocalError as error:
            messages.error(error)
            raise SystemExit(error.exit_status) from None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise SystemExit(130) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                _silence()
                messages.error(MoelocalError("The disk for the output is full.", "Make room, then run it again."))
                raise SystemExit(1) from None
            if error.errno not in (errno.EPIPE, errno.EIO):  # `| head -1`; the terminal vanished
                raise
            _silence()
            raise SystemExit(0) from None

    return inner


def _silence() -> None:
    """Points stdout at nothing, so that Python's own flush at exit does not complain again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)


def main() -> None:
    """Entry point of the console script."""
    first = sys.argv[1:2]
    name = messages.program() if "-completion" not in str(first) else "moelocal"  # a shell completes by name
    app = command_line(*set(first).intersection(COMMANDS))
    app(prog_name=name, complete_var="_MOELOCAL_COMPLETE")
