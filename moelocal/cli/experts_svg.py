"""The picture of `experts` as an SVG file: the heat map, every expert a box of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moelocal.cli.svg import FAINT, Svg
from moelocal.measure.experts import layer_use

if TYPE_CHECKING:
    from moelocal.measure.routing import Run
    from moelocal.model.facts import ModelFacts

_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the mean of the layer, as on the page
_FILLS = ("#dfe7f3", "#b4cbe6", "#7fa8d6", "#4c83c3", "#d9822b", "#b03030")
_UNUSED = "#f4f4f4"
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 64, 210, 44  # px around the map
_MAP, _ROW_LEAST, _ROW_MOST = 900, 10, 24
_MOST_TIPS = 8192  # boxes; more make the file too large


def picture(run: Run, model: str, facts: ModelFacts) -> Svg:
    """Draws what a run saw; resting on a box tells its expert and share."""
    layers, n_experts = run.layers, max(len(run.counts(layer)) for layer in run.layers)
    row = max(_ROW_LEAST, min(_ROW_MOST, 720 // len(layers)))
    cell = min(_ROW_MOST * 2, _MAP / n_experts)
    width, height = _LEFT + cell * n_experts + _RIGHT, _TOP + row * len(layers) + _BOTTOM
    name = facts.name or model
    svg = Svg(max(width, 720), height, f"Experts of {name}")
    svg.words(12, 24, f"{name}: {facts.n_experts} experts, {facts.n_experts_used} per token", 15)
    svg.words(12, 42, f"{run.n_tokens:,} tokens: {', '.join(one.name for one in run.texts)}"[:110], 12, FAINT)
    right = _LEFT + cell * n_experts + 12
    for at, title in enumerate(("even", "max", "never")):
        svg.words(right + 60 * at + 40, _TOP - 6, title, 11, FAINT, "end")
    has_tips = n_experts * len(layers) <= _MOST_TIPS
    for index, layer in enumerate(layers):
        counts = run.counts(layer)
        use, mean, y = layer_use(layer, counts), sum(counts) / len(counts), _TOP + row * index
        svg.words(_LEFT - 8, y + row * 0.5 + 4, f"{layer}", 11, FAINT, "end")
        for expert, n in enumerate(counts):
            tip = f"layer {layer}, expert {expert}: {n / max(1, sum(counts)):.2%} of the choices" if has_tips else ""
            svg.box(_LEFT + cell * expert, y, cell * 0.94, row * 0.94, _fill(n / mean if mean else 0.0), tip)
        texts = (f"{use.evenness:.0%}", f"{use.imbalance:.1f}x", str(len(use.unused) or "-"))
        for at, text in enumerate(texts):
            svg.words(right + 60 * at + 40, y + row * 0.5 + 4, text, 11, anchor="end")
    _legend(svg, height - 16)
    return svg


def _fill(ratio: float) -> str:
    return _FILLS[sum(ratio >= limit for limit in _STEPS)] if ratio > 0 else _UNUSED


def _legend(svg: Svg, y: float) -> None:
    svg.words(12, y, "times the layer's mean:", 11, FAINT)
    named = ("never", 0.0), ("<1/4", 0.1), ("<1/2", 0.3), ("<1", 0.7), ("<2", 1.5), ("<4", 3.0), ("4 and more", 5.0)
    for at, (name, ratio) in enumerate(named):
        svg.box(180 + 72 * at, y - 10, 12, 12, _fill(ratio))
        svg.words(197 + 72 * at, y, name, 11, FAINT)
