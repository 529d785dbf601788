"""`moelocal experts`: which experts a model's routers choose, as a picture and in numbers."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moelocal.cli import options as opt
from moelocal.errors import BadRequest

if TYPE_CHECKING:
    from moelocal.measure.routing import Passage, Run
    from moelocal.model.facts import ModelFacts

_N_CTX = 2048
_LEAST_KEPT = 256  # tokens


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is run, and where the picture goes."""

    text: opt.Text = None
    compare: Annotated[
        tuple[str, str] | None, opt.option("--compare", "Two texts, and how they differ.", "FILE FILE")
    ] = None
    svg: Annotated[Path | None, opt.option("--svg", "Draw the picture into this file too.", "FILE")] = None

    def __post_init__(self) -> None:
        if self.text is not None and self.compare is not None:
            raise BadRequest("--text and --compare exclude each other.", "Give one of them.")
        if self.svg is not None and (self.svg.is_dir() or not self.svg.absolute().parent.is_dir()):
            raise BadRequest(f"The picture cannot be written to {self.svg}.", "Give a file in a folder that exists.")


@dataclass(frozen=True, slots=True)
class Windowed(opt.Placement):
    """How the model runs; a longer text is read in pieces."""

    ctx: Annotated[
        int | None, opt.option("--ctx", "Tokens read at once, those before forgotten. [2048]", "N", min=16)
    ] = None


def experts(
    model: opt.Model,
    analysis: Analysis,
    placement: Windowed,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show which experts a model uses for a text: how evenly, how soon again, and how texts differ.

    Without a text, short passages of six domains are run. The result is kept as the model's profile, in the folder of
    MOELOCAL_HOME: for pruning, and for models larger than RAM.
    """
    from moelocal.cli.guard import guard
    from moelocal.cli.messages import note

    passages = _passages(analysis)
    placement.request()  # bad values are told now, not after the load
    facts = _moe_facts(model)
    guard()
    run = _run(model, placement, passages, facts, verbose)
    if as_json:
        from moelocal.measure.routing import as_document

        print(json.dumps(as_document(run, model, facts.n_experts_used), ensure_ascii=False))
    else:
        from moelocal.cli.render_experts import show

        show(sys.stdout, run, model, facts)
    if not run.interrupted:
        _keep(model, run)
    if analysis.svg is not None:
        from moelocal.cli.experts_svg import picture

        picture(run, model, facts).write(analysis.svg)
        note(f"The picture is in {analysis.svg}.")
    if run.interrupted:
        note(f"(Interrupted: this is what {run.n_tokens:,} tokens showed; it is not kept.)")
        raise SystemExit(130)


def _moe_facts(model: str) -> ModelFacts:
    """What the model is, before it is loaded.

    Raises:
        BadRequest: it has no experts.
    """
    from moelocal.model.facts import read_facts
    from moelocal.model.header import read_header
    from moelocal.model.store import resolve

    facts = read_facts(read_header(resolve(model, lambda _: None)))
    if not facts.is_moe:
        raise BadRequest(
            f"{facts.name or model} is a dense model: it has no experts.",
            "Give a MoE model: moelocal list shows which are; moelocal experts demo works at once.",
        )
    return facts


def _run(model: str, placement: opt.Placement, passages: list[Passage], facts: ModelFacts, verbose: bool) -> Run:
    """Loads the model and runs the texts."""
    from moelocal.cli.opening import LoadingBar, open_model
    from moelocal.cli.screen import quiet_keys
    from moelocal.engine.watch import Watch
    from moelocal.measure.routing import run_texts

    if placement.ctx is None:
        placement = replace(placement, ctx=min(_N_CTX, facts.n_ctx_train or _N_CTX))
    watch = Watch()
    n_experts = {layer.index: layer.n_experts for layer in facts.layers if layer.n_experts}
    opened = open_model(model, placement, verbose, raw=True, one_shot=True, watch=watch)
    with opened.session as session, quiet_keys(), LoadingBar("Running the text", silent=verbose) as bar:
        return run_texts(session, watch, passages, n_experts, bar.update)


def _keep(model: str, run: Run) -> None:
    """Saves the run as the model's profile, in place of the one before."""
    from moelocal.cli.messages import dim
    from moelocal.measure.routing import as_usage
    from moelocal.model.header import read_header
    from moelocal.model.store import resolve
    from moelocal.model.usage import identity, profile_file, save_usage

    if run.n_tokens < _LEAST_KEPT:
        dim(f"Not kept as the profile of this model: {run.n_tokens} tokens are few, {_LEAST_KEPT} are the least.")
        return
    path = resolve(model, lambda _: None)
    header = read_header(path)
    paths = [Path(shard) for shard in header.shards] or [path]
    which = identity(header, paths)
    if save_usage(which, as_usage(run, model)):
        dim(f"Kept as the profile of this model ({run.n_tokens:,} tokens): {profile_file(which)}")
    else:
        dim("The profile could not be kept: the folder of MOELOCAL_HOME cannot be written.")


def _passages(analysis: Analysis) -> list[Passage]:
    """The texts to run."""
    from moelocal.cli.texts import passage, passages

    if analysis.compare is None:
        return passages(analysis.text)
    if analysis.compare[0] == analysis.compare[1]:
        raise BadRequest("--compare got the same text twice.", "Give two different texts.")
    both = [passage(file) for file in analysis.compare]
    same = both[0].name == both[1].name
    return [one._replace(name=file) for one, file in zip(both, analysis.compare, strict=True)] if same else both
