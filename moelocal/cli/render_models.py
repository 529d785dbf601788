"""The pages of `list` and `show`, drawn by rich on stdout. In a pipe lines are as long as they need to be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from moelocal.cli.console import Plain
from moelocal.cli.messages import as_typed
from moelocal.cli.screen import harmless
from moelocal.units import format_bytes, format_count

if TYPE_CHECKING:
    from moelocal.cli.listing import Offer, Row
    from moelocal.cli.show import Card
    from moelocal.plan.outcome import Kind

_ENDLESS = 10_000
_STYLES: dict[Kind, str] = {
    "fits the GPU": "green",
    "experts in RAM": "default",
    "in RAM": "default",
    "needs disk": "yellow",
    "too large": "dim",
}
_NAME_CELLS = 25  # the longest of the catalog, and two for the mark
_WIDE = 74  # cells of a row, without what the model is good at
_FACTS_CELLS = 51  # context, licence and architecture, in a window that has room for them
_LEAST_TEXT = 16


def _console(out: TextIO) -> Console:
    console = Plain(out)
    if not console.is_terminal:
        console.width = _ENDLESS
    return console


def show_rows(rows: Sequence[Row], out: TextIO) -> None:
    """Models on this disk, one a line; on a narrow terminal the less important columns are left out."""
    console = _console(out)
    columns = [
        ("Model", [harmless(row.name).replace("\n", " ") for row in rows]),
        ("Size", [format_bytes(row.n_bytes) for row in rows]),
        ("Type", [harmless(row.quant) for row in rows]),
        ("MoE", ["yes" if row.is_moe else "no" for row in rows]),
        ("Architecture", [harmless(row.arch) for row in rows]),
        ("From", [row.owner for row in rows]),
    ]
    widths = [max(map(cell_len, (name, *cells))) for name, cells in columns]
    while len(columns) > 2 and sum(widths) + 2 * (len(widths) - 1) > console.width:
        columns.pop()
        widths.pop()
    table = Table.grid(padding=(0, 2))
    for name, _ in columns:
        table.add_column(no_wrap=name != "Model", justify="right" if name == "Size" else "left", overflow="fold")
    table.add_row(*(Text(name, style="bold") for name, _ in columns))
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(Text, cells))
    _print(console, out, table)


def show_offers(offers: Iterable[Offer], out: TextIO) -> None:
    """The catalog, each row when it comes: widths are fixed beforehand."""
    console = _console(out)
    is_wide = console.width >= _WIDE
    room = console.width - _WIDE - 2
    is_widest = room > _LEAST_TEXT + _FACTS_CELLS
    room -= _FACTS_CELLS * is_widest
    head = _offer_line(("  Model", "Size", "Parameters", "Here", "Tokens/s"), is_wide)
    head += _facts_cells("Context", "Licence", "Architecture") * is_widest
    console.print(Text(head + ("  Good at" if room > _LEAST_TEXT else ""), style="bold"), soft_wrap=True)
    n_here = 0
    for offer in offers:
        entry, found = offer.entry, offer.outcome
        n_here += offer.is_here
        name = ("* " if offer.is_here else "  ") + entry.name
        params = f"{_count(entry.total_params)}-A{_count(entry.active_params)}"
        rate = "-" if found.decode_per_s is None else _rate(found.decode_per_s)
        line = _offer_line((name, format_bytes(offer.facts.total_bytes), params, found.kind, rate), is_wide)
        text = Text(line, style=_STYLES[found.kind])
        if is_widest:
            text.append(_facts_cells(f"{entry.n_ctx // 1024}k", entry.licence, entry.arch), style="dim")
        if room > _LEAST_TEXT:
            good_at = Text("  " + entry.good_at, style="dim")
            good_at.truncate(room + 2, overflow="ellipsis")
            text.append_text(good_at)
        console.print(text, soft_wrap=True)
    if n_here:
        console.print(Text("  * on this disk", style="dim"))


def _facts_cells(n_ctx: str, licence: str, arch: str) -> str:
    return f"  {n_ctx:>7}  {set_cell_size(licence, 24)}  {set_cell_size(arch, 14)}"


def _offer_line(cells: tuple[str, str, str, str, str], is_wide: bool) -> str:
    name, size, params, kind, rate = cells
    middle = f"{params:<12}  " if is_wide else ""
    return f"{set_cell_size(name, _NAME_CELLS)} {size:>8}  {middle}{kind:<14}  {rate:>8}"


def _count(n: int) -> str:
    return format_count(n).replace(".0", "")


def _rate(per_s: float) -> str:
    return f"{per_s:.0f}" if per_s >= 10 else f"{per_s:.1f}" if per_s >= 0.1 else "< 0.1"


def show_card(card: Card, out: TextIO) -> None:
    """What a person wants to know of one model."""
    console = _console(out)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in card.lines:
        facts.add_row(f"  {name}", Text(harmless(as_typed(value))))
    weights = Table.grid(padding=(0, 2))
    weights.add_column()
    weights.add_column(no_wrap=True, justify="right")
    weights.add_column(no_wrap=True, justify="right")
    weights.add_column()
    weights.add_row(*(Text(name, style="bold") for name in ("  Weights", "size", "bits", "types")))
    for role in card.roles:
        weights.add_row(f"  {role.name}", format_bytes(role.n_bytes), f"{role.bits:.1f}", role.types)
    verdict = Table.grid(padding=(0, 2))
    verdict.add_row(Text("Here", style="bold"), Text(harmless(card.verdict)))
    _print(console, out, Text(harmless(card.title), style="bold"), facts, "", weights, "", verdict)


def _print(console: Console, out: TextIO, *parts: RenderableType) -> None:
    """Draws without the spaces that fill rich's lines."""
    with console.capture() as drawn:
        for part in parts:
            console.print(part)
    out.write("".join(line.rstrip() + "\n" for line in drawn.get().splitlines()))
