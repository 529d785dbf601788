"""How far a conversion is, on a terminal."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from moelocal.cli.console import Plain
from moelocal.cli.screen import harmless


class Bar:
    """One line on stderr: what is done, how much of it, how long it will take; gone when closed."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(overflow="ellipsis", no_wrap=True)),
            BarColumn(20),
            TextColumn("{task.fields[share]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=Plain(),
            transient=True,
        )
        self._label = ""
        self._task = self._progress.add_task("", total=None, share="")

    def show(self, label: str, share: float | None, text: str) -> None:
        """Shows a step: its share that is done, 0 to 1 (None: not known), and in figures."""
        if label != self._label:
            self._label = label
            self._progress.reset(self._task)  # the speed of the step before says nothing
        total = None if share is None else 1.0
        self._progress.update(self._task, description=harmless(label), total=total, completed=share or 0.0, share=text)
        self._progress.start()  # not before it has a label; again it does nothing

    def close(self) -> None:
        """Takes it off the screen."""
        self._progress.stop()
