"""What `bench` shows: a table with bars, CSV, a table to paste into a forum, a chart."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from moelocal.cli.console import Plain
from moelocal.cli.messages import note
from moelocal.cli.screen import harmless
from moelocal.cli.svg import BLUE, FAINT, ORANGE, Svg
from moelocal.units import format_bytes, format_count

if TYPE_CHECKING:
    from moelocal.cli.bench import Output, Result
    from moelocal.machine.hardware import Machine
    from moelocal.measure.bench_rows import Row

_BAR = 20  # columns
_LEAST_BAR = 5
_ROW, _CHART, _RIGHT = 26, 360, 190  # px of the chart
_LETTER = 7.3  # px of a letter of size 12
_LONG_NAME = 36  # letters of a model's name
_ENDLESS = 10_000


def show(results: Sequence[Result], machine: Machine, output: Output, as_json: bool) -> None:
    """Prints results as asked, and then draws them: what was measured is seen even if the picture cannot be kept."""
    if as_json:
        rows = [result.row.as_json() | (_change_json(result) if output.compare else {}) for result in results]
        print(json.dumps(rows, ensure_ascii=False), flush=True)
    elif output.csv:
        _print_csv(results)
    elif output.markdown:
        print(markdown(results, machine), flush=True)
    else:
        _print_table(results, output.compare)
    if not as_json and not output.markdown:  # these carry them
        for text in _notes(results):
            note(text)
    if output.svg is not None:
        chart(results, machine).write(output.svg)
        note(f"The chart is in {output.svg}.")


def _notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know to trust the figures."""
    return [f"{_what(result, results)}: {text}." for result in results for text in result.row.samples.notes]


def _change_json(result: Result) -> dict[str, Any]:
    change = result.change
    if change is None:
        return {"compared": None}
    earlier = change.earlier
    return {
        "compared": {
            "when": earlier.when,
            "llama_cpp_python": earlier.engine,
            "change": round(change.share, 4),
            "noise": round(change.noise, 4),
            "verdict": change.verdict,
        }
    }


def _settings(result: Result, results: Sequence[Result]) -> str:
    """What of the setting differs among the results, in words."""
    all_of = [one.row.setting for one in results]
    mine, parts = result.row.setting, []
    if len({(one.threads, one.threads_batch) for one in all_of}) > 1:
        both = mine.threads == mine.threads_batch
        parts.append(_threads(mine.threads) if both else f"{mine.threads}+{mine.threads_batch} threads")
    if len({one.n_ubatch for one in all_of}) > 1:
        parts.append(f"ubatch {mine.n_ubatch:,}")
    if len({one.repack for one in all_of}) > 1:
        parts.append("repacked" if mine.repack else "as in the file")
    if len({one.kv_type for one in all_of}) > 1:
        parts.append(f"KV {mine.kv_type}")
    if len({(one.row.model, _in_ram(one.row)) for one in results}) > len({one.row.model for one in results}):
        parts.append(f"experts of {_in_ram(result.row)} layers in RAM")
    return ", ".join(parts)


def _threads(n: int) -> str:
    return f"{n} thread" if n == 1 else f"{n} threads"


def _in_ram(row: Any) -> int:
    return len(row.setting.expert_layers.get("CPU", ()))


def _what(result: Result, results: Sequence[Result]) -> str:
    """Model, setting and test, in words."""
    many = len({one.row.model for one in results}) > 1
    parts = (result.row.model if many else "", _settings(result, results), result.row.test.name)
    return ", ".join(part for part in parts if part)


def _print_table(results: Sequence[Result], compares: bool) -> None:
    console = Plain(sys.stdout)
    if not console.is_terminal:
        console.width = _ENDLESS
    width = console.width
    most = {
        kind: max(r.row.samples.median for r in results if bool(r.row.test.n_prompt) == kind)
        for kind in {bool(result.row.test.n_prompt) for result in results}
    }
    columns: list[tuple[str, list[Text]]] = [
        ("Model", [Text(harmless(r.row.model)) for r in results]),
        ("Setting", [Text(_settings(r, results)) for r in results]),
        ("Test", [Text(r.row.test.name) for r in results]),
        ("tokens/s", [Text(_per_s(r.row.samples.median), style="bold") for r in results]),
        ("min - max", [Text(_range(r), style="dim") for r in results]),
    ]
    if len({r.row.model for r in results}) == 1:
        columns = columns[1:]
        console.print(Text(harmless(results[0].row.model), style="bold"))
    columns.append(("predicted", [Text(_per_s(r.row.predicted_per_s)) for r in results]))
    columns.append(("of the limit", [Text(_share(r)) for r in results]))
    if compares:
        columns.append(("before", [_change(r) for r in results]))
    columns = _fitting([(name, cells) for name, cells in columns if any(cell.plain for cell in cells)], width)
    n_bar = min(_BAR, width - _columns_width(columns) - 2)  # the bars take what the figures leave
    if n_bar >= _LEAST_BAR:
        bars = [_bar(r.row.samples.median, most[bool(r.row.test.n_prompt)], n_bar) for r in results]
        after = [name for name, _ in columns].index("tokens/s") + 1
        columns.insert(after, ("", bars))
    table = Table.grid(padding=(0, 2))
    for name, _ in columns:
        table.add_column(
            justify="right" if name in _RIGHT_ALIGNED else "left",
            no_wrap=name not in ("Model", "Setting", "before"),
            min_width=6,
        )
    table.add_row(*(Text(name, style="dim") for name, _ in columns))
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    console.print(table)
    console.print(Text(_setting_line(results), style="dim"))


_Columns = list[tuple[str, list[Text]]]


def _fitting(columns: _Columns, width: int) -> _Columns:
    """The columns that a window has room for; what tells the rows apart, and their speeds, always stay."""
    for name in ("predicted", "min - max", "of the limit"):
        if _columns_width(columns) > width:
            columns = [column for column in columns if column[0] != name]
    return columns


def _columns_width(columns: _Columns) -> int:
    return sum(max(len(name), *(cell.cell_len for cell in cells)) + 2 for name, cells in columns) - 2


_RIGHT_ALIGNED = ("tokens/s", "predicted", "of the limit")


def _setting_line(results: Sequence[Result]) -> str:
    """What is the same for all results."""
    one = results[0].row.setting
    all_of = [result.row.setting for result in results]
    parts = []
    if len({(its.threads, its.threads_batch) for its in all_of}) == 1:
        more = f" ({one.threads_batch} for prompts)" if one.threads_batch != one.threads else ""
        parts.append(_threads(one.threads) + more)
    if len({its.n_ubatch for its in all_of}) == 1:
        parts.append(f"ubatch {one.n_ubatch:,}")
    if len({its.kv_type for its in all_of}) == 1:
        parts.append(f"KV {one.kv_type}")
    if len({its.repack for its in all_of}) == 1:
        parts.append("weights repacked" if one.repack else "weights as in the file")
    peak = max(result.row.samples.peak_ram_bytes for result in results)
    return ", ".join([*parts, f"RAM at most {format_bytes(peak)}"])


def _per_s(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _range(result: Result) -> str:
    per_s = result.row.samples.per_s
    return f"{_per_s(min(per_s))} - {_per_s(max(per_s))}"


def _share(result: Result) -> str:
    return f"{result.row.samples.median / result.row.roofline_per_s:.0%}"


def _bar(value: float, most: float, n_columns: int) -> Text:
    eighths = max(1, round(8 * n_columns * value / most))
    full, rest = divmod(eighths, 8)
    return Text("█" * full + " ▏▎▍▌▋▊▉"[rest].strip(), style="blue")


def _change(result: Result) -> Text:
    change = result.change
    if change is None:
        return Text("-", style="dim")
    style = {"slower": "bold red", "faster": "green"}.get(change.verdict, "dim")
    told = (
        ""
        if change.verdict == "same"
        else f" {change.verdict.upper() if change.verdict == 'slower' else change.verdict}"
    )
    return Text(f"{change.share:+.1%} (noise {change.noise:.1%}){told}", style=style)


_CSV = (
    "model", "test", "n_prompt", "n_gen", "n_depth", "median", "min", "max", "threads", "threads_batch", "n_ubatch",
    "repack", "kv_type", "expert_layers_in_ram", "predicted_per_s", "roofline_per_s", "peak_ram_bytes", "major_faults",
)  # fmt: skip


def _print_csv(results: Sequence[Result]) -> None:
    writer = csv.DictWriter(sys.stdout, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in results:
        document = result.row.as_json()
        writer.writerow(document | document["tokens_per_s"] | {"expert_layers_in_ram": _in_ram(result.row)})


def build_line(results: Sequence[Result], machine: Machine) -> str:
    """Machine, model and build on one line."""
    from moelocal import __version__
    from moelocal.engine import llama

    cards = [device.description for device in machine.gpus if device.kind == "gpu"]
    hardware = " + ".join([*cards, f"{machine.cpu.name} ({machine.cpu.cores} cores)"])
    ram = f"{format_bytes(machine.ram_total_bytes)} RAM"
    return f"{hardware}, {ram}; moelocal {__version__}, llama-cpp-python {llama.version()}"


def _model_line(result: Result) -> str:
    facts = result.subject.facts
    active = f", {format_count(facts.active_params)} active" if facts.is_moe else ""
    return (
        f"{_shared_name(result.row.model)}: {facts.arch} {format_count(facts.total_params)}{active}, {facts.quant}, "
        f"{format_bytes(facts.file_bytes)}"
    )


def markdown(results: Sequence[Result], machine: Machine) -> str:
    """A table as forums and GitHub show it, with machine, models and build on one line, and what was odd."""
    models = dict.fromkeys(harmless(_model_line(result)) for result in results)
    lines = ["; ".join([build_line(results, machine), *models])]
    lines += ["", "| model | setting | test | tokens/s | min - max | predicted | of the roofline |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for result in results:
        row = result.row
        setting = _settings(result, results) or _setting_line([result]).rpartition(", ")[0]
        cells = (
            _shared_name(row.model), setting, row.test.name,
            _per_s(row.samples.median), _range(result), _per_s(row.predicted_per_s), _share(result),
        )  # fmt: skip
        lines.append("| " + " | ".join(harmless(cell).replace("|", "\\|") for cell in cells) + " |")
    if notes := _notes(results):
        lines += ["", *(f"- {harmless(text)}" for text in notes)]
    return "\n".join(lines)


def chart(results: Sequence[Result], machine: Machine) -> Svg:
    """Bars for every row, prompts first; a mark where the roofline is, if it is in the picture."""
    results = sorted(results, key=lambda result: not result.row.test.n_prompt)
    names = [_label(result, results) for result in results]
    head = [build_line(results, machine), *dict.fromkeys(map(_model_line, results)), _setting_line(results)]
    left = 26 + _LETTER * max(map(len, names))
    top, bottom = 42 + 15 * len(head), 34
    width = max(left + _CHART + _RIGHT, 32 + 11 / 12 * _LETTER * max(map(len, head)))
    svg = Svg(width, top + len(results) * _ROW + bottom, "Tokens per second")
    svg.words(16, 26, "Tokens per second", 17)
    for i, line in enumerate(head):
        svg.words(16, 45 + 15 * i, line, 11, FAINT)
    has_marks = False
    for i, (result, name) in enumerate(zip(results, names, strict=True)):
        row, y = result.row, top + i * _ROW
        is_prompt = bool(row.test.n_prompt)
        most = _most(one.row for one in results if bool(one.row.test.n_prompt) == is_prompt)
        scale = _CHART / most
        svg.words(left - 10, y + 17, name, 12, anchor="end")
        colour = BLUE if is_prompt else ORANGE
        svg.box(left, y + 4, row.samples.median * scale, 17, colour, f"{name}: {_range(result)}")
        low, high = min(row.samples.per_s) * scale, max(row.samples.per_s) * scale
        svg.box(left + low, y + 12, high - low, 1.5, "#000000")
        if row.roofline_per_s <= most:
            has_marks = True
            svg.box(left + row.roofline_per_s * scale, y + 2, 1.5, 21, FAINT, f"roofline {_per_s(row.roofline_per_s)}")
        svg.words(left + _CHART + 10, y + 17, f"{_per_s(row.samples.median)}  ({_range(result)})", 12)
    legend = f"Thin lines: slowest to fastest run.{' Grey marks: roofline.' if has_marks else ''}"
    svg.words(16, top + len(results) * _ROW + 20, legend, 11, FAINT)
    return svg


def _most(rows: Iterable[Row]) -> float:
    """The speed at the right end of the bars: the fastest run, or the roofline if that is near."""
    alike = list(rows)
    near = 1.5 * max(one.samples.median for one in alike)
    return max(*(max(one.samples.per_s) for one in alike), min(near, max(one.roofline_per_s for one in alike)))


def _label(result: Result, results: Sequence[Result]) -> str:
    """What a bar is about: nothing of it may be missing where bars differ in it."""
    parts = (_shared_name(result.row.model), _settings(result, results), result.row.test.name)
    return ", ".join(part for part in parts if part)


def _shared_name(model: str) -> str:
    """A model as others know it: of a path the file's name."""
    name = PurePath(model).name if model.endswith(".gguf") else model
    return name if len(name) <= _LONG_NAME else f"{name[: _LONG_NAME // 2]}…{name[1 - _LONG_NAME // 2 :]}"
