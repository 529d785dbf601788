"""A plan as a picture: a bar per device, a strip of layers, then figures, reasons, alternatives and flags.

Every device has a colour and a sign of its own, so the picture is also read without colours. 60 to 120 columns wide.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moelocal.cli.console import Plain
from moelocal.cli.messages import as_typed
from moelocal.cli.screen import harmless
from moelocal.plan.memory import CPU
from moelocal.units import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from moelocal.machine.hardware import Machine
    from moelocal.model.facts import ModelFacts
    from moelocal.plan.cost import Prediction
    from moelocal.plan.planner import MemoryUse, Plan

_LEAST, _MOST = 60, 120
_PARTS = (("weights", "█", "blue"), ("KV cache", "▓", "magenta"), ("compute", "▒", "yellow"), ("free", "░", "dim"))
_RAM = "□", "dim"
_GPUS = (("■", "green"), ("●", "cyan"), ("▲", "yellow"), ("◆", "magenta"))
_DENSE = "·", "dim"
_PER_GROUP = 10
_FIGURES = 24  # columns of `11.6 GiB of 11.6 GiB`, and spaces


def show_plan(plan: Plan, facts: ModelFacts, machine: Machine, out: TextIO) -> None:
    """Prints a plan for a person."""
    console = Plain(out)
    width = min(_MOST, max(_LEAST, console.width))
    console.width = width
    console.print(_title(facts))
    console.print()
    console.print(_bars(plan, machine, width))
    console.print(Text("  ").append_text(_legend()))
    if plan.disk_bytes:
        console.print(Text(f"  {format_bytes(plan.disk_bytes)} of weights stay on the disk", style="bold red"))
    console.print()
    for line in _strip(plan, facts, width):
        console.print(line)
    console.print()
    console.print(_speeds(plan))
    console.print()
    _section(console, "Why", tuple(as_typed(reason) for reason in plan.reasons))
    if plan.alternatives:
        console.print(Text("What else", style="bold"))
        console.print(_alternatives(plan, width))
        console.print()
    console.print(Text("The same for llama-server", style="bold"))
    args = plan.as_json(facts)["llama_args"]
    # never wrapped by us: it is there to be copied
    console.print(Text("  llama-server -m FILE " + shlex.join(args), style="cyan"), soft_wrap=True)


def _title(facts: ModelFacts) -> Text:
    name = facts.name if facts.quant.lower() in facts.name.lower() else f"{facts.name} {facts.quant}"
    title = Text(harmless(name), style="bold")
    size = f"  {format_bytes(facts.total_bytes)}, {format_count(facts.total_params)} parameters"
    title.append(size, style="not bold")
    if facts.is_moe:
        used = f"{facts.n_experts_used} of {facts.n_experts} experts"
        title.append(f", {format_count(facts.active_params)} active ({used})", style="not bold")
    return title


def _bars(plan: Plan, machine: Machine, width: int) -> Table:
    names = {device.name: device.description for device in machine.devices}
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right")
    labels = [_label(plan, use, names.get(use.name, "")) for use in plan.per_device]
    bar_width = max(10, width - max(label.cell_len for label in labels) - _FIGURES)
    for use, label in zip(plan.per_device, labels, strict=True):
        figures = f"{format_bytes(use.total_bytes)} of {format_bytes(use.budget_bytes)}"
        grid.add_row(label, _bar(use, bar_width), figures)
    return grid


def _label(plan: Plan, use: MemoryUse, description: str) -> Text:
    sign, style = _sign(plan, use.name)
    label = Text(f"  {sign} ", style=style).append("RAM" if use.name == CPU else use.name, style="default bold")
    if use.name != CPU:
        label.append(f" {harmless(description)}", style="default")
    label.truncate(30, overflow="ellipsis")
    return label


def _bar(use: MemoryUse, width: int) -> Text:
    """Weights, KV, compute and what is free, in proportion; what is there at all has at least one cell."""
    sizes = [use.weights_bytes, use.kv_bytes, use.compute_bytes]
    whole = max(1, use.budget_bytes, sum(sizes))
    bar, left = Text(), width
    for (_, sign, style), size in zip(_PARTS, sizes, strict=False):
        cells = min(left, max(1 if size else 0, round(size * width / whole)))
        bar.append(sign * cells, style=style)
        left -= cells
    return bar.append(_PARTS[-1][1] * left, style=_PARTS[-1][2])


def _legend() -> Text:
    legend = Text()
    for name, sign, style in _PARTS:
        legend.append(sign, style=style).append(f" {name}  ", style="dim")
    return legend


def _sign(plan: Plan, name: str) -> tuple[str, str]:
    """A device's sign and colour in the strip."""
    others = [use.name for use in plan.per_device if use.name != CPU]
    return _RAM if name not in others else _GPUS[others.index(name) % len(_GPUS)]


def _strip(plan: Plan, facts: ModelFacts, width: int) -> Iterator[Text]:
    """Layers in groups of ten, each with the sign of the device that holds its experts."""
    if plan.placement is None:
        return
    heading = "Where each layer's experts live" if facts.is_moe else "Where each layer lives"
    yield Text(heading, style="bold")
    cells = []
    for layer, home, where in zip(facts.layers, plan.placement.layers, plan.placement.experts, strict=True):
        cells.append(
            _DENSE if facts.is_moe and not layer.expert_tensors else _sign(plan, where if facts.is_moe else home)
        )
    groups = max(1, (width - 8) // (_PER_GROUP + 1))
    for start in range(0, len(cells), groups * _PER_GROUP):
        line = Text(f"  {start:>3} ", style="dim")
        for index, (sign, style) in enumerate(cells[start : start + groups * _PER_GROUP]):
            line.append(" " if index and index % _PER_GROUP == 0 else "").append(sign, style=style)
        yield line
    held = plan.expert_layers(facts) if facts.is_moe else {}
    note = Text("      ")
    for name, layers in held.items():
        sign, style = _sign(plan, name)
        note.append(sign, style=style).append(f" {'RAM' if name == CPU else name} {len(layers)}  ", style="dim")
    if any(cell is _DENSE for cell in cells):
        note.append(f"{_DENSE[0]} no experts", style="dim")
    if note.plain.strip():
        yield note


def _speeds(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(no_wrap=True)
    table.add_row(*(Text(name, style="bold") for name in ("Speed", "answer", "prompt", "first token")))
    for name, speeds in (("predicted", plan.predicted), ("measured", plan.measured)):
        if speeds is not None:
            table.add_row(*_speed_row(name, speeds))
    return table


def _speed_row(name: str, speeds: Prediction) -> list[str]:
    rates = [f"{format_rate(rate).removesuffix('/s')} tokens/s" for rate in (speeds.decode_per_s, speeds.prefill_per_s)]
    return [f"  {name}", *rates, format_seconds(speeds.first_token_s)]


def _section(console: Console, title: str, lines: tuple[str, ...]) -> None:
    console.print(Text(title, style="bold"))
    for line in lines:
        table = Table.grid()
        table.add_column(width=4)
        table.add_column()
        table.add_row("  - ", Text(harmless(line)))
        console.print(table)
    console.print()


def _alternatives(plan: Plan, width: int) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    now = plan.predicted.decode_per_s if plan.predicted else 0.0
    for one in plan.alternatives:
        style = "green" if one.decode_per_s > now * 1.02 else "dim" if one.decode_per_s < now * 0.98 else "default"
        rate = Text(f"{now:.1f} -> {one.decode_per_s:.1f} tokens/s", style=style)
        table.add_row(Text(harmless(one.change)), rate, format_bytes(one.total_bytes))
    return Padding(table, (0, 0, 0, 2))
