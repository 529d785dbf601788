"""How far an evaluation is, on a terminal: a bar with the estimates so far and the time left."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from moelocal.cli.console import Plain
from moelocal.cli.screen import harmless


class Bar:
    """One line on stderr; gone when closed. Chunks that an earlier process did count as done, not as speed."""

    def __init__(self, label: str, n_chunks: int, n_done: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(overflow="ellipsis", no_wrap=True)),
            BarColumn(20),
            TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=Plain(),
            transient=True,
        )
        self._task = self._progress.add_task(harmless(label), total=n_chunks, completed=n_done)
        self._progress.start()

    def update(self, n_done: int, label: str) -> None:
        """Shows how many chunks are done, and what is known so far."""
        self._progress.update(self._task, completed=n_done, description=harmless(label))

    def close(self) -> None:
        """Takes it off the screen."""
        self._progress.stop()
