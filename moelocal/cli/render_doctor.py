"""The page of `doctor`, drawn by rich on stdout. Apart from `render.py`, whose Markdown takes long to import.

Fits terminals of 60 to 120 columns, narrower ones by wrapping; a pipe gets 80 columns, or COLUMNS, and no colours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moelocal.cli.console import Plain
from moelocal.cli.screen import harmless
from moelocal.units import format_bytes

if TYPE_CHECKING:
    from moelocal.machine.hardware import Device, Engine, Machine
    from moelocal.machine.problems import Problem
    from moelocal.plan.verdict import Outlook, Verdict

_MAX_WIDTH = 100
_BAR_CELLS = 16
_FAST_PER_S = 60.0  # a full bar
_FEATURES = {  # as printed; what a better one of the same CPU implies is left out
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "BF16",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX VNNI",
    "avx2": "AVX2",
    "avx": "AVX",
    "sme": "SME",
    "sve": "SVE",
    "i8mm": "I8MM",
    "dotprod": "DotProd",
    "neon": "NEON",
}


def show(out: TextIO, machine: Machine, engine: Engine, problems: tuple[Problem, ...], verdict: Verdict) -> None:
    """Draws what `doctor` found."""
    console = Plain(out)
    console.width = min(console.width, _MAX_WIDTH)
    plain = not console.encoding.lower().startswith("utf")
    parts: list[RenderableType] = [_facts(machine, engine)]
    if problems:
        parts += ["", Text("What can be better", style="bold"), _problems(problems, console.width)]
    parts += ["", *_outlooks(verdict, console.width, plain), "", _ending(verdict, bool(problems))]
    with console.capture() as drawn:
        console.print(Padding(Group(*parts), (1, 1, 1, 2)))
    out.write("".join(line.rstrip() + "\n" for line in drawn.get().splitlines()))


def _facts(machine: Machine, engine: Engine) -> Table:
    """The machine, a line or two for each part."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    features = _feature_names(machine.cpu.features)
    table.add_row("CPU", _with(f"{_clean(machine.cpu.name)}, {_cores(machine)}", features))
    ram = f"{format_bytes(machine.ram_total_bytes)}, {format_bytes(machine.ram_free_bytes)} free"
    table.add_row("RAM", _with(ram, _speed(machine.measured_bandwidth("CPU"))))
    for index, card in enumerate(machine.gpus):
        table.add_row("GPU" if index == 0 else "", _card(machine, card))
    if not machine.gpus:
        table.add_row("GPU", Text("none that llama.cpp can use", style="dim"))
    free = "" if machine.disk.free_bytes is None else f"{format_bytes(machine.disk.free_bytes)} free"
    place = ", ".join(part for part in (f"models in {_tilde(machine.disk.path)}", free) if part)
    table.add_row("Disk", _with(place, _speed(machine.disk.read_bytes_per_s)))
    backends = ", ".join(sorted(engine.backends))
    table.add_row("Engine", f"llama-cpp-python {engine.version.partition(' ')[0]} with {_clean(backends)}")
    return table


def _card(machine: Machine, card: Device) -> Text:
    memory = "shares the RAM" if card.shares_ram else f"{format_bytes(card.free_bytes)} free"
    text = f"{_clean(card.description)}, {format_bytes(card.total_bytes)}, {memory}"
    known = card.name if card.name.startswith(card.backend) else f"{card.name} by {card.backend}"
    small = [known, _speed(machine.measured_bandwidth(card.name))]
    return _with(text, ", ".join(part for part in small if part))


def _problems(problems: tuple[Problem, ...], width: int) -> Table:
    """Each problem, and the command below it; a command that several share is shown once, after the last of them."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style="yellow", no_wrap=True)
    table.add_column(overflow="fold")
    for index, problem in enumerate(problems):
        table.add_row("  !", harmless(problem.what))
        following = problems[index + 1].fix if index + 1 < len(problems) else None
        if problem.fix != following:
            lines = command_lines(harmless(problem.fix), width - 8)
            table.add_row("", Text("\n".join(lines), style="cyan", overflow="fold"))
    return table


def command_lines(command: str, width: int) -> list[str]:
    """A command in lines of at most `width` where that is possible, so that all of them together can still be copied.

    Broken only between arguments, never inside quotes, with the shell's own mark at the end of a line.
    """
    mark = " `" if command.startswith("$env:") else " \\"
    lines = [""]
    for word in re.findall(r"""(?:"[^"]*"|'[^']*'|\S)+""", command):
        longer = f"{lines[-1]} {word}" if lines[-1].strip() else f"{lines[-1]}{word}"
        if len(longer) + len(mark) > width and lines[-1].strip():
            lines[-1] += mark
            longer = f"  {word}"
            lines.append("")
        lines[-1] = longer
    return lines


def _outlooks(verdict: Verdict, width: int, plain: bool) -> list[RenderableType]:
    """Well-known models and how fast they would be."""
    source = "by speeds measured here" if verdict.measured else "estimated, nothing measured yet"
    parts: list[RenderableType] = [Text("Models at 4 bits", style="bold").append(f"  {source}", style="not bold dim")]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    if width >= 72:
        table.add_column(no_wrap=True)
    for found in verdict.outlooks:
        cells: list[Text] = [
            Text(f"  {found.model.name}"),
            Text(format_bytes(found.model.file_bytes), style="dim"),
            _outlook(found),
        ]
        table.add_row(*cells, *([_bar(found, plain)] if width >= 72 else []))
    parts.append(table)
    return parts


def _outlook(found: Outlook) -> Text:
    if found.decode_per_s is None:
        return Text(f"needs {format_bytes(found.missing_bytes)} more", style="dim")
    rate = f"{found.decode_per_s:.0f}" if found.decode_per_s >= 3 else f"{found.decode_per_s:.1f}"
    return Text(f"{rate} tokens/s" if found.runs_well else f"{rate} tokens/s, slow")


def _bar(found: Outlook, plain: bool) -> Text:
    share = min(1.0, (found.decode_per_s or 0.0) / _FAST_PER_S)
    cells = round(share * _BAR_CELLS)
    style = "green" if found.runs_well else "yellow"
    return Text(("#" if plain else "━") * max(cells, 1 if share else 0), style=style)


def _ending(verdict: Verdict, has_problems: bool) -> Table:
    """The verdict, the last thing on the page and the one to remember."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold" if has_problems else "bold green", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("Verdict", harmless(verdict.sentence))
    return table


def _with(text: str, small: str) -> Text:
    """Text, and behind it small print."""
    return Text(harmless(text)).append(f"  {harmless(small)}" if small else "", style="dim")


def _cores(machine: Machine) -> str:
    cpu = machine.cpu
    physical, fast = cpu.physical_cores, cpu.performance_cores
    text = f"{physical} core" + "s" * (physical != 1)
    if 0 < fast < physical:
        text += f" ({fast} fast)"
    return text if cpu.cores == (fast or physical) else f"{text}, {cpu.cores} to use"


def _feature_names(features: tuple[str, ...]) -> str:
    known = [name for feature, name in _FEATURES.items() if feature in features]
    if any(name.startswith("AVX-512 ") for name in known):
        known = [name for name in known if name != "AVX-512"]
    implied = {"AVX"} if "AVX2" in known else set()
    if any(name.startswith("AVX-512") for name in known):
        implied |= {"AVX2", "AVX"}
    return ", ".join(name for name in known if name not in implied)


def _speed(bytes_per_s: float | None) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s else ""


def _tilde(path: str) -> str:
    home = str(Path.home())
    return _clean("~" + path[len(home) :] if path.startswith(home + "/") else path)


def _clean(text: str) -> str:
    return harmless(" ".join(text.split()))
