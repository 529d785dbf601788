"""What `pull` shows on stderr: the quantizations to choose from, and how far the download is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Column, Table
from rich.text import Text

from moelocal.cli.console import Plain
from moelocal.cli.screen import harmless
from moelocal.units import format_bytes

if TYPE_CHECKING:
    from moelocal.model.download import Progress as Download
    from moelocal.plan.choose import Choice, Option

_MOST_BARS = 8
_FIGURES_WIDTH = 44  # a short bar, bytes, speed, time left
_HEADINGS = ("", "Type", "Size", "Bits", "Answer", "Here")


def show_choice(choice: Choice) -> None:
    """The options, the most exact first, each with a number; the best one is marked."""
    table = Table.grid(padding=(0, 2))
    for heading in _HEADINGS:
        table.add_column(
            justify="right" if heading in ("Size", "Bits", "Answer") else "left", no_wrap=heading != "Here"
        )
    table.add_row(*(Text(heading, style="bold") for heading in _HEADINGS))
    for number, option in enumerate(reversed(choice.options), 1):
        table.add_row(*_row(number, option, option is choice.best))
    Plain().print(table)


def _row(number: int, option: Option, is_best: bool) -> list[Text]:
    style = "bold green" if is_best else "dim" if option.why_not else "default"
    speeds = option.plan.predicted if option.plan else None
    rate = f"{speeds.decode_per_s:.1f} tokens/s" if speeds else "-"
    here = option.why_not or ("the best for this machine" if is_best else "fits")
    sign = f"{number:>3}{'>' if is_best else ' '}"
    cells = (sign, harmless(option.label), format_bytes(option.n_bytes), f"{option.bits:.1f}", rate, here)
    return [Text(cell, style=style) for cell in cells]


class Bars:
    """Bars for the files and for all together, with speed and time left; gone when closed."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(overflow="ellipsis")),  # in a narrow window shortened
            BarColumn(None),
            DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
            SpeedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=Plain(),
            transient=True,
            expand=True,
        )
        self._tasks: list[TaskID] = []
        self._total: TaskID | None = None
        self._progress.start()

    def update(self, download: Download) -> None:
        """Shows how far it is."""
        if not self._tasks:
            room = max(12, min(43, self._progress.console.width - _FIGURES_WIDTH))  # shards differ at the end
            for name, done, size in download.files:
                short = harmless(name if len(name) <= room else f"{name[: room // 3]}…{name[room // 3 + 1 - room :]}")
                self._tasks.append(self._progress.add_task(short, total=size, completed=done))
            if len(download.files) > 1:
                self._total = self._progress.add_task(
                    f"all\u00a0{len(download.files)}\u00a0files", total=download.n_bytes, completed=download.n_done
                )
        current = next((i for i, (_, done, size) in enumerate(download.files) if done < size), len(self._tasks) - 1)
        first = max(0, min(current - 1, len(self._tasks) - _MOST_BARS))
        for index, (task, (_, done, _size)) in enumerate(zip(self._tasks, download.files, strict=True)):
            self._progress.update(task, completed=done, visible=first <= index < first + _MOST_BARS)
        if self._total is not None:
            self._progress.update(self._total, completed=download.n_done)

    def close(self) -> None:
        """Takes the bars off the screen."""
        self._progress.stop()
