"""What `prune` shows: which experts go, and what share of the routers' choices and weights they had. Plain text."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from moelocal.cli.pruning import Decision, Row

_NARROW = 40
_HEAD = f"{'Layer':>5}  {'Choices':>7}  {'Weight':>7}  Experts that go"


def show(out: TextIO, decision: Decision) -> None:
    """Prints the decision, a row for each layer; on a terminal the lists of experts are cut at its width."""
    width = max(_NARROW, shutil.get_terminal_size().columns - 1) if out.isatty() else None
    cut = decision.cut
    n_all, n_gone = cut.experts.n_experts, cut.experts.n_experts - cut.n_keep
    title = f"{cut.n_keep} of {n_all} experts stay in each layer, {cut.experts.n_used} per token."
    why = f"Chosen by {cut.record.criterion} on {decision.text}."
    for line in (title, why, "", _HEAD, *(_line(row) for row in decision.rows)):
        print(_clipped(line, width), file=out)
    seen = [row for row in decision.rows if row.choices is not None and row.mass is not None]
    choices = sum(row.choices or 0.0 for row in seen) / len(seen)
    mass = sum(row.mass or 0.0 for row in seen) / len(seen)
    print(f"{'mean':>5}  {choices:7.1%}  {mass:7.1%}  {n_gone} of {n_all}", file=out)
    out.flush()


def _line(row: Row) -> str:
    choices, mass = ("-" if share is None else f"{share:.1%}" for share in (row.choices, row.mass))
    return f"{row.layer:5d}  {choices:>7}  {mass:>7}  {_ranges(row.dropped)}"


def _ranges(ids: tuple[int, ...]) -> str:
    """(1, 2, 3, 7) -> '1-3 7'."""
    parts: list[list[int]] = []
    for expert in ids:
        if parts and parts[-1][-1] == expert - 1:
            parts[-1][1:] = [expert]
        else:
            parts.append([expert])
    return " ".join("-".join(map(str, part)) for part in parts)


def _clipped(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else line[: width - 3] + "..."
