"""What `quantize` shows: all types, what a job would make, and how far it is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from moelocal.cli.console import Plain
from moelocal.cli.screen import harmless
from moelocal.model.ggml_types import GGML_TYPES
from moelocal.model.roles import tensor_role
from moelocal.units import format_bytes

if TYPE_CHECKING:
    from moelocal.build.quantize import Preview, TensorChange
    from moelocal.build.quantize import Progress as Done
    from moelocal.build.types import QuantType

_ENDLESS = 10_000
_LEAST_S, _LEAST_DONE = 1.0, 0.02  # of the work, before its end is guessed
_ROLES = {
    "routed_expert": "experts",
    "shared_expert": "shared experts",
    "dense_ffn": "dense layers",
    "attention": "attention",
    "router": "routers",
    "embedding": "embeddings",
    "output": "output",
}
_REST = "norms and others"
_IMATRIX = {"no": "-", "helps": "helps", "advised": "advised", "required": "needed"}


class Bar:
    """One line on stderr: which tensor, which type it gets, how much of the work is done; gone when closed."""

    def __init__(self, n_tensors: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(overflow="ellipsis", no_wrap=True)),
            BarColumn(20),
            TextColumn("{task.percentage:.0f}%", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=Plain(),
            transient=True,
        )
        self._task = self._progress.add_task("Quantizing", total=1.0, left=time_left(0.0, 0.0))
        self._start = time.monotonic()
        self._progress.start()

    def update(self, done: Done) -> None:
        """Shows how far it is."""
        change = done.change
        label = f"{done.number}/{done.n_tensors} {harmless(change.name)} {GGML_TYPES[change.after].name}"
        left = time_left(done.fraction, time.monotonic() - self._start)
        self._progress.update(self._task, completed=done.fraction, description=label, left=left)

    def close(self) -> None:
        """Takes it off the screen."""
        self._progress.stop()


def time_left(fraction: float, seconds: float) -> str:
    """Minutes and seconds of the rest, by the mean speed so far: the latest alone says hours within a large tensor."""
    if seconds < _LEAST_S or fraction < _LEAST_DONE:
        return "--:--"
    minutes, rest = divmod(round(seconds * (1 - fraction) / fraction), 60)
    return f"{minutes:02d}:{rest:02d}"


def show_preview(planned: Preview, out: TextIO) -> None:
    """What each role's weights take before and after, and in which types."""
    groups: dict[str, list[TensorChange]] = {}
    for change in planned.changes:
        groups.setdefault(_role(change.name), []).append(change)
    rows = [
        (role, *_figures(groups[role]), _types(groups[role])) for role in (*_ROLES.values(), _REST) if role in groups
    ]
    rows.append(("together", *_figures(planned.changes), ""))
    _table(("Weights", "Tensors", "Before", "After", "Bits", "Types"), rows, "lrrrrl", out)


def _role(name: str) -> str:
    return _REST if "norm" in name else _ROLES.get(tensor_role(name)[1], _REST)


def _figures(changes: Sequence[TensorChange]) -> tuple[str, str, str, str]:
    before, after = sum(change.bytes_before for change in changes), sum(change.bytes_after for change in changes)
    bits = 8 * after / sum(change.n_values for change in changes)
    return f"{len(changes):,}", format_bytes(before), format_bytes(after), f"{bits:.2f}"


def _types(changes: Sequence[TensorChange]) -> str:
    held = Counter(GGML_TYPES[change.after].name for change in changes)
    if len(held) == 1:
        return next(iter(held))
    return ", ".join(f"{n} {name}" for name, n in held.most_common())


def show_types(kinds: Sequence[QuantType], n_values: int | None, out: TextIO) -> None:
    """All types, from the best to the smallest. `n_values`: weights of a model, whose size is then shown."""
    rows = []
    for kind in kinds:
        size = () if n_values is None else (f"~{format_bytes(n_values * kind.bits / 8)}",)
        more = (kind.quality, _IMATRIX[kind.imatrix], kind.cpu, kind.gpu, kind.note)
        rows.append((kind.name, f"{kind.bits:.1f}", *size, *more))
    size_head = () if n_values is None else ("Size",)
    head = ("Type", "Bits", *size_head, "Quality", "Imatrix", "CPU", "GPU", "")
    _table(head, rows, "lr" + "r" * len(size_head) + "lllll", out)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str, out: TextIO) -> None:
    """Draws a table; on a narrow terminal the last columns are left out. In a pipe lines are as long as they must."""
    console = Plain(out)
    if not console.is_terminal:
        console.width = _ENDLESS
    widths = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
    n = len(widths)
    while n > 2 and sum(widths[:n]) + 2 * (n - 1) > console.width:
        n -= 1
    table = Table.grid(padding=(0, 2))
    for side in sides[:n]:
        table.add_column(no_wrap=True, justify="right" if side == "r" else "left")
    table.add_row(*(Text(name, style="bold") for name in head[:n]))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row[:n]))
    with console.capture() as drawn:
        console.print(table)
    out.write("".join(line.rstrip() + "\n" for line in drawn.get().splitlines()))
