"""The page of `experts`: a heat map with layers down and experts across, and what the numbers say.

Readable from 40 columns on; where experts outnumber the columns, neighbours share a cell that shows their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from rich.table import Table
from rich.text import Text

from moelocal.cli.console import Plain
from moelocal.cli.screen import harmless
from moelocal.measure.experts import CACHE_SHARES, LayerUse, layer_use, top_share
from moelocal.measure.routing import Pair, compare, mean_lru_hits

if TYPE_CHECKING:
    from moelocal.measure.routing import Run
    from moelocal.model.facts import ModelFacts

_LEAST, _MOST = 40, 120  # columns
_NARROW = 60  # below, the figures beside the map are left out
_LABEL, _FIGURES = 6, 21  # columns
_WIDEST_CELL = 4
_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the mean of the layer, where colours change
_COLOURS = ("color(60)", "color(67)", "color(73)", "color(107)", "color(178)", "color(160)")
_SHADES, _ASCII = "░░▒▒▓█", "..::*#"  # for the same steps
_UNUSED = {"utf": "·", "ascii": "_"}
_N_LISTED = 5


class _Paint:
    """What a cell looks like on this terminal."""

    def __init__(self, console: Plain) -> None:
        self.is_utf = console.encoding.lower().startswith("utf")
        self.has_colour = console.color_system is not None and not console.no_color
        self.unused = _UNUSED["utf" if self.is_utf else "ascii"]
        self._shades = ("█" * len(_COLOURS) if self.has_colour else _SHADES) if self.is_utf else _ASCII

    def cell(self, ratio: float, width: int = 1) -> Text:
        """A cell of experts that are used `ratio` times as often as the mean."""
        if ratio <= 0:
            return Text(self.unused * width, style="dim")
        step = sum(ratio >= limit for limit in _STEPS)
        return Text(self._shades[step] * width, style=_COLOURS[step])

    def legend(self) -> Text:
        """What the cells mean."""
        text = _small("times the mean: ").append_text(self.cell(0)).append(" never  ")
        named = [("<¼" if self.is_utf else "<1/4", 0.1), ("<½" if self.is_utf else "<1/2", 0.3)]
        named += [("<1", 0.7), ("<2", 1.5), ("<4", 3.0), ("4+", 5.0)]
        if not self.has_colour:  # shades that stand for two steps
            named = [named[1], ("<2", 1.5), ("<4", 3.0), ("4+", 5.0)]
        for name, ratio in named:
            text.append_text(self.cell(ratio)).append(f" {name}  ")
        text.rstrip()
        return text


def show(out: TextIO, run: Run, model: str, facts: ModelFacts) -> None:
    """Prints what a run saw."""
    console = Plain(out)
    console.width = min(_MOST, max(_LEAST, console.width))
    paint = _Paint(console)
    uses = [layer_use(layer, run.counts(layer)) for layer in run.layers]
    parts: list[Text | Table | str] = [_title(run, model, facts), ""]
    parts += _map(run, uses, console.width, paint)
    parts += [paint.legend(), "", _concentration(run, uses), "", _extremes(run, uses)]
    if len(run.texts) > 1:
        pairs = compare(run)
        parts += [
            "",
            *(_difference(run, pairs[0], paint) if len(pairs) == 1 else _differences(run, pairs, console.width)),
        ]
    with console.capture() as drawn:
        for part in parts:
            console.print(part)
    out.write("".join(line.rstrip() + "\n" for line in drawn.get().splitlines()))


def _title(run: Run, model: str, facts: ModelFacts) -> Text:
    name = harmless(facts.name or model)
    n = len(run.layers)
    text = Text(name, style="bold")
    text.append(
        f"  {n} MoE layer{'s' * (n != 1)}, {facts.n_experts} experts each, {facts.n_experts_used} per token", "not bold"
    )
    names = [harmless(one.name) + (f" {one.n_tokens:,}" if len(run.texts) > 1 else "") for one in run.texts]
    return text.append(f"\n{run.n_tokens:,} tokens: {', '.join(names)}", "not bold dim")


def _small(text: str) -> Text:
    """Small print that more is appended to."""
    return Text().append(text, "dim")


def cells(counts: Sequence[int], n_cells: int) -> list[float]:
    """Use of neighbouring experts, put together into at most `n_cells` of equal size, in times of the layer's mean."""
    each = -(-len(counts) // n_cells)
    mean = sum(counts) / len(counts)
    groups = [counts[at : at + each] for at in range(0, len(counts), each)]
    return [sum(group) / len(group) / mean if mean else 0.0 for group in groups]


def _map(run: Run, uses: Sequence[LayerUse], width: int, paint: _Paint) -> list[Text]:
    """A row per layer, below a row that names the columns."""
    n_experts = max(len(run.counts(layer)) for layer in run.layers)
    has_figures = width >= _NARROW
    room = width - _LABEL - (_FIGURES if has_figures else 1)
    cell_width = max(1, min(_WIDEST_CELL, room // n_experts))
    each = -(-n_experts // room) if n_experts > room else 1
    n_columns = -(-n_experts // each) * cell_width
    first, last = "0", f"{n_experts - 1}" + (f" ({each} a cell)" if each > 1 else "")
    label = f"{first}{last.rjust(n_columns - 1)}" if n_columns > len(last) + 1 else first.ljust(n_columns)
    head = Text(f"{'layer'.ljust(_LABEL)}{label}", style="dim")
    if has_figures:
        head.append(f"{'even':>7}{'max':>7}{'never':>7}")
    rows = [head]
    for use in uses:
        row = _small(f"{use.layer:>5} ")
        for ratio in cells(run.counts(use.layer), room):
            row.append_text(paint.cell(ratio, cell_width))
        if has_figures:
            row.append(f"{use.evenness:>7.0%}{use.imbalance:>6.1f}x{len(use.unused) or '-':>7}")
        rows.append(row)
    return rows


def _concentration(run: Run, uses: Sequence[LayerUse]) -> Table:
    """What the most used experts take, and what a cache of that many would have."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in CACHE_SHARES:
        table.add_column(justify="right", no_wrap=True)
    hits = mean_lru_hits(run)
    counts = [run.counts(use.layer) for use in uses]
    taken = [sum(top_share(one, share) for one in counts) / len(counts) for share in CACHE_SHARES]
    table.add_row("Of each layer's experts", *(f"{share:.0%}" for share in CACHE_SHARES), style="dim")
    table.add_row("the most used take", *(f"{share:.0%}" for share in taken))
    table.add_row("the last used (LRU) would hit", *(f"{hit:.0%}" for hit in hits))
    return table


def _extremes(run: Run, uses: Sequence[LayerUse]) -> Text:
    """Hot and dead experts, in words."""
    hot = sorted(
        (
            (run.counts(use.layer)[expert] / max(1, sum(run.counts(use.layer))), use.layer, expert)
            for use in uses
            for expert in use.hot
        ),
        reverse=True,
    )
    lines = []
    if hot:
        named = ", ".join(f"layer {layer} expert {expert} ({share:.0%})" for share, layer, expert in hot[:_N_LISTED])
        more = f" and {len(hot) - _N_LISTED} more" if len(hot) > _N_LISTED else ""
        lines.append(f"Hot, over 3 times the mean: {named}{more}")
    n_unused, n_all = sum(len(use.unused) for use in uses), sum(len(run.counts(use.layer)) for use in uses)
    n_choices = min(sum(run.counts(use.layer)) / len(run.counts(use.layer)) for use in uses)
    if n_unused:
        lines.append(f"Never chosen: {n_unused:,} of {n_all:,} experts.")
    if n_choices < 20:
        lines.append(f"That is {n_choices:.0f} choices per expert: a longer text tells more about those that are rare.")
    return Text("\n".join(lines) or "Every expert was chosen, and none more than 3 times as often as the mean.")


def _difference(run: Run, pair: Pair, paint: _Paint) -> list[Text]:
    """Two texts: how far apart in each layer, and the experts that changed most."""
    text = Text("Difference of the two texts", style="bold")
    text.append("  0 none, 1 nothing in common", "not bold dim")
    rows = [text]
    a, b = run.texts
    for layer, bits in zip(run.layers, pair.bits, strict=True):
        one, other = a.tallies[layer].counts, b.tallies[layer].counts
        shares = [
            (m / max(1, sum(other)) - n / max(1, sum(one)), i) for i, (n, m) in enumerate(zip(one, other, strict=True))
        ]
        most = sorted(shares, key=lambda item: -abs(item[0]))[:3]
        changed = ", ".join(f"{expert} {change:+.0%}" for change, expert in most if abs(change) >= 0.005)
        row = _small(f"{layer:>5} ").append(f"{bits:.2f} ")
        bar = round(bits * 20)
        row.append(("━" if paint.is_utf else "#") * bar + " " * (20 - bar), "blue")
        rows.append(row.append(f" {changed}", "dim"))
    rows.append(Text(harmless(f"  expert +5%: {b.name} sends 5% more of its choices there than {a.name}"), style="dim"))
    rows.append(
        Text(f"Mean {pair.mean_bits:.2f}; chance alone would make about {pair.chance_bits:.2f} of texts this long.")
    )
    return rows


def _differences(run: Run, pairs: Sequence[Pair], width: int) -> list[Text | Table]:
    """Several texts: a table of every two."""
    title = Text("How far apart the texts are", style="bold")
    title.append("  0 none, 1 nothing in common; mean of the layers", "not bold dim")
    table = Table.grid(padding=(0, 2 if width >= 72 else 1))
    found = {(pair.a, pair.b): pair.mean_bits for pair in pairs}
    names = [one.name for one in run.texts]
    table.add_column(no_wrap=True)
    for _ in names[1:]:
        table.add_column(justify="right", no_wrap=True)
    short = 11 if width >= 72 else 5
    table.add_row("", *(harmless(name)[:short] for name in names[1:]), style="dim")
    for name in names[:-1]:
        values = [found.get((name, other)) for other in names[1:]]
        table.add_row(harmless(name), *("" if bits is None else f"{bits:.2f}" for bits in values))
    chance = sum(pair.chance_bits for pair in pairs) / len(pairs)
    return [title, table, Text(f"Chance alone would make about {chance:.2f} of texts this long.", style="dim")]
