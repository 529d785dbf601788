"""Rich's console as this program uses it: text as it is, no markup, no colours of its own choice."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NoReturn, TextIO

from rich.console import Console


class Plain(Console):
    """A console on `out`, default stderr, that prints what it gets."""

    def __init__(self, out: TextIO | None = None, **options: Any) -> None:
        super().__init__(file=out or sys.stderr, highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> NoReturn:
        """The reader went away (`| head`): the program is told, and ends well; rich alone would exit with 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
