"""Texts run through a model whose routers are watched: text in, tallies per layer out. Also the built-in passages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moelocal.engine.nodes import route
from moelocal.engine.session import Session
from moelocal.engine.watch import Watch
from moelocal.errors import BadRequest, MoelocalError
from moelocal.measure.experts import (
    CACHE_SHARES,
    TOP_SHARES,
    Recent,
    Tally,
    divergence_bits,
    layer_use,
    slots,
)
from moelocal.model.usage import ExpertUsage, LayerUsage, cache_hits

_PASSAGES = Path(__file__).with_name("passages.txt")
_LEAST_TOKENS = 32
_HEADING = re.compile(r"^== (.+) ==$", re.MULTILINE)


class Passage(NamedTuple):
    """A text to run, with the name that it is shown by."""

    name: str
    text: str


@dataclass(slots=True)
class Routed:
    """What the routers did with one text: a tally per MoE layer."""

    name: str
    n_tokens: int = 0
    tallies: dict[int, Tally] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """All texts of a run, those that were begun; `interrupted` by Ctrl-C."""

    texts: list[Routed]
    n_used: Mapping[int, int]
    interrupted: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(one.n_tokens for one in self.texts)

    @property
    def layers(self) -> list[int]:
        """The MoE layers that were seen."""
        return sorted({layer for one in self.texts for layer in one.tallies})

    def tallies(self, layer: int) -> list[Tally]:
        """One layer's tallies, one of each text."""
        return [one.tallies[layer] for one in self.texts if layer in one.tallies]

    def counts(self, layer: int) -> list[int]:
        """How often each expert of a layer was chosen, in all texts."""
        return [sum(column) for column in zip(*(tally.counts for tally in self.tallies(layer)), strict=True)]

    def mass(self, layer: int) -> list[float]:
        """Weights that each expert of a layer got, added up over all texts."""
        return [sum(column) for column in zip(*(tally.mass for tally in self.tallies(layer)), strict=True)]

    def reuse(self, layer: int) -> list[int]:
        """Reuse distances of a layer's choices, in all texts one after another."""
        return [sum(column) for column in zip(*(tally.reuse for tally in self.tallies(layer)), strict=True)]

    def ranked(self, layer: int) -> list[int]:
        """Places by rank of a layer's choices, likewise."""
        return [sum(column) for column in zip(*(tally.ranked for tally in self.tallies(layer)), strict=True)]


def built_in() -> list[Passage]:
    """Short passages of several domains, written for this."""
    parts = _HEADING.split(_PASSAGES.read_text(encoding="utf-8"))
    return [Passage(name, text.strip("\n") + "\n") for name, text in zip(parts[1::2], parts[2::2], strict=True)]


def run_texts(
    session: Session,
    watch: Watch,
    passages: Sequence[Passage],
    n_experts: Mapping[int, int],
    progress: Callable[[float], None],
) -> Run:
    """Runs every text, the long ones in chunks of the context's length; stops early, with what was seen, at Ctrl-C.

    Args:
        n_experts: of each MoE layer.
        progress: called with 0.0 to 1.0.

    Raises:
        BadRequest: a text is too short to say anything.
        MoelocalError: llama.cpp failed, or a layer has more experts than its header says.
    """
    texts = [(one.name, _chunks(session, one)) for one in passages]
    n_all = sum(len(chunk) for _, chunks in texts for chunk in chunks)
    n_used: dict[int, int] = {}
    run = Run([], n_used)
    recent = {layer: Recent() for layer in n_experts}
    try:
        for name, chunks in texts:
            its = Routed(name, tallies={layer: Tally(n, recent[layer]) for layer, n in n_experts.items()})
            run.texts.append(its)
            for n_new in _route(session, watch, chunks):
                for layer, choices in watch.take().items():
                    n_used[layer] = choices.n_used
                    its.tallies[layer].add(choices.experts, choices.weights, choices.n_used)
                its.n_tokens += n_new
                progress(run.n_tokens / n_all)
    except KeyboardInterrupt:
        run.interrupted = True
        run.texts = [one for one in run.texts if one.n_tokens]
        if not run.texts:
            raise
    except (KeyError, ValueError) as error:
        raise MoelocalError(
            f"llama.cpp routes to experts that the file's header does not have ({error}).",
            "Run again with -v for llama.cpp's log; the file may be damaged.",
        ) from error
    if not n_used:
        raise MoelocalError(
            "llama.cpp showed no router of this model.",
            "Its architecture routes in a way of its own, which moelocal cannot watch yet.",
        )
    for one in run.texts:  # layers that the graph leaves out
        one.tallies = {layer: tally for layer, tally in one.tallies.items() if layer in n_used}
    return run


def _route(session: Session, watch: Watch, chunks: Sequence[Sequence[int]]) -> Iterator[int]:
    """Tokens computed, batch after batch."""
    for chunk in chunks:
        before = 0
        for done in route(session, watch, chunk):
            yield done - before
            before = done


def _chunks(session: Session, passage: Passage) -> list[list[int]]:
    """A text's tokens in pieces that the context holds, each after the model's begin token if it has one.

    Raises:
        BadRequest: too few tokens.
    """
    tokens = session.tokenize(passage.text, special=False)
    if len(tokens) < _LEAST_TOKENS:
        raise BadRequest(
            f"{passage.name} has {len(tokens)} tokens; {_LEAST_TOKENS} are the least that say anything.",
            "Give a longer text: a thousand words or more; without --text, built-in passages are run.",
        )
    begin = [] if session.begin is None else [session.begin]
    room = session.n_ctx - len(begin)
    return [begin + tokens[at : at + room] for at in range(0, len(tokens), room)]


class Pair(NamedTuple):
    """How two texts differ: the divergence in bits of each layer, and what chance alone would make of their lengths."""

    a: str
    b: str
    bits: tuple[float, ...]
    chance_bits: float

    @property
    def mean_bits(self) -> float:
        """Of all layers."""
        return sum(self.bits) / len(self.bits)


def compare(run: Run) -> list[Pair]:
    """Every two texts of a run."""
    return [_pair(a, b) for i, a in enumerate(run.texts) for b in run.texts[i + 1 :]]


def _pair(a: Routed, b: Routed) -> Pair:
    layers = sorted(a.tallies)
    bits = tuple(divergence_bits(a.tallies[layer].counts, b.tallies[layer].counts) for layer in layers)
    # the divergence that chance makes grows with 1/n_a + 1/n_b; between the halves of one text that is 4/n
    unit = sum(_halves_bits(one) * one.n_tokens / 4 for one in (a, b)) / 2
    return Pair(a.name, b.name, bits, unit * (1 / a.n_tokens + 1 / b.n_tokens))


def _halves_bits(text: Routed) -> float:
    tallies = text.tallies.values()
    return sum(divergence_bits(*tally.halves) for tally in tallies) / len(tallies)


def mean_lru_hits(run: Run) -> list[float]:
    """Share of choices that a cache of `CACHE_SHARES` of each layer's experts would hit, on average over the layers."""
    rows = [_layer_lru_hits(run.reuse(layer)) for layer in run.layers]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _layer_lru_hits(reuse: Sequence[int]) -> list[float]:
    return [cache_hits(reuse, slots(share, len(reuse) - 1)) for share in CACHE_SHARES]


def as_usage(run: Run, model: str) -> ExpertUsage:
    """The run as it is kept with the model."""
    layers = tuple(
        LayerUsage(
            layer, tuple(run.counts(layer)), tuple(run.mass(layer)), tuple(run.reuse(layer)), tuple(run.ranked(layer))
        )
        for layer in run.layers
    )
    text = ", ".join(one.name for one in run.texts)[:200]
    return ExpertUsage(model, text, run.n_tokens, max(run.n_used.values()), layers)


def as_document(run: Run, model: str, n_experts_used: int) -> dict[str, Any]:
    """What `experts --json` prints. Rows of `counts` are the MoE layers, in the order of `layers`."""
    return {
        "model": model,
        "n_tokens": run.n_tokens,
        "n_layers": len(run.layers),
        "n_experts": max(len(run.counts(layer)) for layer in run.layers),
        "n_experts_used": n_experts_used,
        "counts": [run.counts(layer) for layer in run.layers],
        "layers": [_layer_document(run, layer) for layer in run.layers],
        "lru_hits": _by_share(CACHE_SHARES, mean_lru_hits(run)),
        "texts": [
            {
                "name": one.name,
                "n_tokens": one.n_tokens,
                "counts": [one.tallies[layer].counts for layer in sorted(one.tallies)],
            }
            for one in run.texts
        ],
        "differences": [
            {
                "a": pair.a,
                "b": pair.b,
                "mean_bits": round(pair.mean_bits, 5),
                "chance_bits": round(pair.chance_bits, 5),
                "layers": [round(bits, 5) for bits in pair.bits],
            }
            for pair in compare(run)
        ],
        "interrupted": run.interrupted,
    }


def _layer_document(run: Run, layer: int) -> dict[str, Any]:
    use = layer_use(layer, run.counts(layer))
    return {
        "layer": layer,
        "entropy": round(use.entropy, 5),
        "evenness": round(use.evenness, 5),
        "max_share": round(use.max_share, 5),
        "imbalance": round(use.imbalance, 4),
        "unused": list(use.unused),
        "hot": list(use.hot),
        "top_half_share": round(use.top_shares[-1], 5),
        "top_shares": _by_share(TOP_SHARES, use.top_shares),
        "lru_hits": _by_share(CACHE_SHARES, _layer_lru_hits(run.reuse(layer))),
        "mass": [round(mass, 4) for mass in run.mass(layer)],
    }


def _by_share(shares: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    return {f"{share:.0%}": round(value, 5) for share, value in zip(shares, values, strict=True)}
