"""What each expert of a model does for a text: how often it is chosen, with which weight, how much it then adds. Also
which experts to keep by that.

    watch = Watch(outputs=True)
    ...                                                  # a session loaded with it
    layers = calibrate(session, watch, texts, n_experts, progress)
    keep_best(layers[3].scores("impact"), n_keep=48)     # layer 3's best experts

What an expert adds for a token is its router weight times the norm of its output. `impact` sums the square roots of
that over the tokens: an expert matters if many tokens use it, and more if it adds much. The sum keeps rare experts, the
root keeps few tokens with huge outputs from deciding; docs/prune.md has the comparison.

Source: for `reap` Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE compression, 2025, equation 9
(the mean, over the tokens that are routed to an expert, of its router weight times the norm of its output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moelocal.engine.nodes import route
from moelocal.engine.session import Session
from moelocal.engine.watch import Choices, Watch
from moelocal.errors import BadRequest, MoelocalError

Criterion = Literal["impact", "reap", "frequency"]
LEAST_TOKENS = 256
"""A shorter text says nothing about which experts are needed."""
ENOUGH_CHOICES = 100
"""Mean choices of an expert from which on its count is known to about 10 % (the error of a count is its root)."""


@dataclass(slots=True)
class Saliency:
    """One layer's sums over a text: `counts` how often each expert was chosen, `mass` the router weights that it got,
    `added` those weights times the norms of its outputs, `impact` the roots of these products. `n_tokens` were
    routed."""

    n_experts: int
    n_tokens: int = 0
    counts: list[int] = field(init=False)
    mass: list[float] = field(init=False)
    added: list[float] = field(init=False)
    impact: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * self.n_experts
        self.mass = [0.0] * self.n_experts
        self.added = [0.0] * self.n_experts
        self.impact = [0.0] * self.n_experts

    def add(self, choices: Choices, is_weighted: bool = False) -> None:
        """Takes the choices of the next tokens. `is_weighted`: the outputs have the weights in them already.

        Raises:
            ValueError: an id that no expert has.
        """
        import numpy as np

        n = self.n_experts
        experts = np.asarray(choices.experts, np.int64)
        if len(experts) and not 0 <= experts.min() <= experts.max() < n:
            raise ValueError(f"expert {experts.max()} of {n}")
        self.n_tokens += choices.n_tokens
        weights, norms = np.asarray(choices.weights, np.float64), np.asarray(choices.norms, np.float64)
        self.counts = (np.bincount(experts, minlength=n) + self.counts).tolist()
        if len(weights) == len(experts):
            self.mass = (np.bincount(experts, weights, n) + self.mass).tolist()
        if len(norms) == len(experts) == len(weights):
            products = norms if is_weighted else norms * weights
            self.added = (np.bincount(experts, products, n) + self.added).tolist()
            self.impact = (np.bincount(experts, np.sqrt(np.abs(products)), n) + self.impact).tolist()

    def scores(self, criterion: Criterion) -> list[float]:
        """How much each expert matters: for `impact` the sum of its roots, for `reap` the mean of what it adds to a
        token that it was chosen for, for `frequency` the number of those tokens."""
        if criterion == "frequency":
            return [float(count) for count in self.counts]
        if criterion == "impact":
            return list(self.impact)
        return [added / count if count else 0.0 for added, count in zip(self.added, self.counts, strict=True)]


def keep_best(scores: Sequence[float], n_keep: int, n_groups: int = 1) -> tuple[int, ...]:
    """The experts with the highest scores, as many of each group of neighbours, in their order; of equals the first."""
    size = len(scores) // n_groups
    kept: list[int] = []
    for start in range(0, len(scores), size):
        group = sorted(range(start, start + size), key=lambda expert: (-scores[expert], expert))
        kept += sorted(group[: n_keep // n_groups])
    return tuple(kept)


def calibrate(
    session: Session,
    watch: Watch,
    texts: Sequence[Sequence[int]],
    n_experts: Mapping[int, int],
    progress: Callable[[float], None],
) -> dict[int, Saliency]:
    """Runs texts (their tokens), the long ones in chunks of the context's length; layer -> what its experts did.

    Args:
        n_experts: of each layer with experts; those that llama.cpp does not run are missing in the result.
        progress: called with 0.0 to 1.0.

    Raises:
        BadRequest: the texts are too short.
        KeyboardInterrupt: Ctrl-C.
        MoelocalError: llama.cpp failed, or shows no routers.
    """
    chunks = [chunk for tokens in texts for chunk in _chunks(session, tokens)]
    n_all, n_done = sum(map(len, chunks)), 0
    if n_all < LEAST_TOKENS:
        raise BadRequest(
            f"The text has {n_all} tokens; {LEAST_TOKENS} are the least that say which experts are needed.",
            "Give a longer one: some thousand words of what the model shall still be good at.",
        )
    is_weighted = session.header.metadata.get("general.architecture") == "llama4"  # weights go to the experts' inputs
    found: dict[int, Saliency] = {}
    try:
        for chunk in chunks:
            for done in route(session, watch, chunk):
                for layer, choices in watch.take().items():
                    found.setdefault(layer, Saliency(n_experts[layer])).add(choices, is_weighted)
                progress((n_done + done) / n_all)
            n_done += len(chunk)
    except (KeyError, ValueError) as error:
        raise MoelocalError(
            f"llama.cpp routes to experts that the file's header does not have ({error}).",
            "Run again with -v for llama.cpp's log; the file may be damaged.",
        ) from error
    if not found:
        raise MoelocalError(
            "llama.cpp showed no router of this model.",
            "Its architecture routes in a way of its own, which moelocal cannot watch yet.",
        )
    _check(found)
    return found


def _chunks(session: Session, tokens: Sequence[int]) -> list[list[int]]:
    """Pieces that the context holds, each after the model's begin token if it has one."""
    begin = [] if session.begin is None else [session.begin]
    room = session.n_ctx - len(begin)
    return [begin + list(tokens[at : at + room]) for at in range(0, len(tokens), room)]


def _check(found: Mapping[int, Saliency]) -> None:
    for layer, one in found.items():
        if not all(map(math.isfinite, one.added)):
            raise MoelocalError(
                f"The experts of layer {layer} give no numbers for this text.",
                "The file may be damaged: moelocal eval shows whether the model works at all.",
            )
        if not any(one.impact):
            raise MoelocalError(
                f"llama.cpp does not show what the experts of layer {layer} give.", "Prune by: --criterion frequency"
            )
