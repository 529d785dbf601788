"""`moelocal pull`: a model from the Hugging Face hub to this disk; in the quantization that suits this machine best."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moelocal.cli import options as opt
from moelocal.errors import BadRequest, ModelNotFound, MoelocalError, OutOfMemory

if TYPE_CHECKING:
    from pathlib import Path

    from moelocal.model.client import HubError
    from moelocal.model.download import Progress
    from moelocal.model.header import GGUFHeader
    from moelocal.model.hub import HubModel, Listing
    from moelocal.model.reference import Reference
    from moelocal.model.stored import Stored
    from moelocal.plan.choose import Choice

_LINE_S = 15.0  # between lines where no bar can be shown

Wanted = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name of the catalog (moelocal list --all), owner/repo on the Hugging Face hub, either with :QUANT, or "
        "owner/repo/file.gguf.",
    ),
]
Yes = Annotated[bool, opt.option("--yes -y", "Take the quantization that is best here, without asking.")]


class Taken(NamedTuple):
    """What is to be downloaded; `choice`: how it was chosen, if it was not named."""

    model: HubModel
    choice: Choice | None = None


def pull(model: Wanted, placement: opt.Placement, yes: Yes = False, as_json: opt.Json = False) -> None:
    """Download a model. Without a quantization, the best one for this machine is found and shown."""
    from moelocal.cli.messages import note
    from moelocal.model.client import HubError
    from moelocal.model.download import check_room, download, is_here, targets_of
    from moelocal.model.hub import list_models
    from moelocal.model.reference import parse_reference
    from moelocal.units import format_bytes, format_seconds

    if placement.rpc:
        from moelocal.cli.guard import guard

        guard()  # llama.cpp ends the process when a worker vanishes
    asked = _asked(model)
    try:
        listing = list_models(asked.repo)
    except HubError as error:
        if error.status == 0 and (stored := _instead(asked, error)) is not None:
            note(f"{stored.name} is here already; the hub was not asked.")
            _tell(stored.name, stored.files, stored.quant, as_json)
            return
        raise
    taken = _taken(listing, asked, placement, ask=not (yes or as_json), may_choose=yes)
    if taken is None:
        return
    name = _name(asked, listing, taken.model)
    if is_here(listing, taken.model):
        note(f"{name} is here already.")
        if (named := parse_reference(name)) and (stored := _found(named)) is not None:  # the disk may be read-only
            _tell(name, stored.files, taken.model.quant, as_json, taken.choice)
            return
    elif not asked.file and (stored := _of_another_tool(listing, taken.model, name)) is not None:
        _tell(name, stored.files, taken.model.quant, as_json, taken.choice)
        return
    else:
        check_room(targets_of(listing, taken.model))
    view = DownloadView()
    try:
        paths = download(listing, taken.model, view.update)
    except KeyboardInterrupt:
        view.close()
        note("Stopped. The same command goes on from here.")
        raise
    finally:
        view.close()
    if view.n_fetched and not as_json:
        seconds = view.seconds
        rate = format_bytes(view.n_fetched / seconds)
        note(f"{format_bytes(view.n_fetched)} in {format_seconds(seconds)} ({rate}/s), checked.")
    _tell(name, paths, taken.model.quant, as_json, taken.choice)


def _asked(text: str) -> Reference:
    """What is to be pulled.

    Raises:
        MoelocalError: nothing that the hub could have.
    """
    from moelocal.cli.messages import note
    from moelocal.model.catalog import closest
    from moelocal.model.reference import parse_reference, shortened

    shown = shortened(text)
    if text == "demo":
        raise BadRequest(
            "The demo is part of the program: there is nothing to pull.", 'moelocal run demo "Who are you?"'
        )
    asked = parse_reference(text)
    if asked is not None and asked.repo and not (asked.repo.lower().endswith(".gguf") and not asked.file):
        if os.path.isfile(text):
            note(f"{shown} is taken as the model of that name; the file here is left alone.")
        return asked
    if os.path.isfile(text):
        raise BadRequest(
            f"{shown} is a file on this disk: there is nothing to pull.", f"moelocal run {shlex.quote(text)}"
        )
    close = closest(text.partition(":")[0])
    hint = (
        f"Did you mean {' or '.join(close)}?" if close else "Names: moelocal list --all. On the hub: owner/repo:Q4_K_M"
    )
    raise ModelNotFound(f"There is no model {shown!r} in the catalog, and it is no owner/repo.", hint)


def _found(asked: Reference) -> Stored | None:
    """The model, if it is here."""
    from moelocal.model.store import find_stored

    try:
        return find_stored(asked)
    except MoelocalError:
        return None


def _instead(asked: Reference, failure: HubError) -> Stored | None:
    """The model, if it is here, when the hub cannot be asked.

    Raises:
        MoelocalError: something else of it is here, or in part.
    """
    from moelocal.cli.messages import note
    from moelocal.model.store import find_stored

    try:
        return find_stored(asked)
    except BadRequest:
        note(failure.message)
        raise
    except ModelNotFound as error:
        note(failure.message)
        error.hint = failure.hint
        raise


def _of_another_tool(listing: Listing, model: HubModel, name: str) -> Stored | None:
    """The same model where Ollama or LM Studio keeps it, of which a person is told."""
    from moelocal.cli.messages import note
    from moelocal.model.reference import parse_reference
    from moelocal.model.stored import OWNERS
    from moelocal.units import format_bytes

    named = parse_reference(name)
    stored = _found(named) if named else None
    if stored is None or stored.owner not in ("lmstudio", "ollama"):
        return None
    tool, n_bytes = OWNERS[stored.owner], sum(file.stat().st_size for file in stored.files)
    if n_bytes != model.n_bytes:
        note(f"{tool} has {name} too, but in another version, of {format_bytes(n_bytes)}.")
        return None
    typed = shlex.quote(f"{listing.repo}/{model.files[0].path}")
    note(f"{tool} has {name} already. To download it all the same: moelocal pull {typed}")
    return stored


def _taken(listing: Listing, asked: Reference, placement: opt.Placement, ask: bool, may_choose: bool) -> Taken | None:
    """The model of the repository to download; None: none, the user says."""
    from moelocal.model.hub import pick

    if asked.quant or asked.file:
        return Taken(pick(listing, asked.quant, asked.file))
    choice = _choice(listing, asked, placement)
    assert choice.best is not None
    if len(listing.models) == 1:
        return Taken(listing.models[0], choice)
    best, shown = choice.best.label, asked.entry.name if asked.entry else listing.repo
    model = next(model for model in listing.models if model.label == best)
    if not may_choose and not (ask and sys.stdin.isatty() and sys.stderr.isatty()):
        raise BadRequest(
            f"{listing.repo} holds {len(listing.models)} models. The best one here is {best}: {choice.reason}.",
            f"To take it: moelocal pull {shown} --yes. Or name one: moelocal pull {_typed(asked, listing, model)}",
        )
    if ask:
        from moelocal.cli.render_pull import show_choice

        show_choice(choice)
    _explain(choice, best)
    best = _answer(choice, best) if ask else best
    found = next((model for model in listing.models if model.label == best), None)
    return Taken(found, choice) if found else None


def _explain(choice: Choice, best: str) -> None:
    from moelocal.cli.messages import note

    is_noun = choice.reason.startswith("the ")
    note(f"{best}{' is' if is_noun else ':'} {choice.reason}.")
    for sentence in choice.neighbours:
        note(f"  {sentence}")


def _answer(choice: Choice, best: str) -> str:
    """The label that the user takes; '' for none."""
    from moelocal.cli.messages import note
    from moelocal.cli.screen import forget_typed

    labels = [option.label for option in reversed(choice.options)]
    forget_typed()
    while True:
        print(f"Take {best}? [Enter: yes, a number or type: another, q: none] ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        typed = line.strip()
        if not line or typed.lower() in ("q", "n", "no", "quit"):
            print("" if line else "\n", end="", file=sys.stderr)
            note("Nothing was pulled.")
            return ""
        if typed.lower() in ("", "y", "yes"):
            return best
        if typed.isdecimal() and 1 <= int(typed) <= len(labels):
            return labels[int(typed) - 1]
        for label in labels:
            if typed.upper() in (label.upper(), label.upper().removeprefix("UD-")):
                return label
        print(f"There is no {typed!r:.40}.", file=sys.stderr)


def _choice(listing: Listing, asked: Reference, placement: opt.Placement) -> Choice:
    """The best model of a repository for this machine, by its true header.

    Raises:
        OutOfMemory: none fits.
    """
    from moelocal.cli.messages import note
    from moelocal.cli.plan import present
    from moelocal.model.download import cache_folder, check_room, free_bytes, missing_bytes, targets_of
    from moelocal.model.facts import read_facts
    from moelocal.model.remote import read_remote, usual
    from moelocal.model.rescale import resized
    from moelocal.plan.choose import Candidate, choose

    seen = usual(listing)
    header = read_remote(listing, seen)
    machine = present(read_facts(header), placement, False)
    request, room = placement.request(), free_bytes(cache_folder(listing.repo))
    n = len(listing.models)
    note(f"Planning {f'{n} models' if n > 1 else 'the model'} of {listing.repo} for this machine ...")

    def candidate(model: HubModel, its_header: GGUFHeader) -> Candidate:
        missing = missing_bytes(targets_of(listing, model))
        return Candidate(model.label, model.n_bytes, read_facts(its_header), missing)

    candidates = {
        model.label: candidate(model, resized(header, model.quant, model.n_bytes)) for model in listing.models
    }
    checked: set[str] = set()
    while True:
        choice = choose(tuple(candidates.values()), machine, request, room)
        if choice.best is None:
            check_room(min((targets_of(listing, model) for model in listing.models), key=missing_bytes))
            raise OutOfMemory(
                f"No model of {listing.repo} fits this machine: {choice.reason}.",
                "Smaller ones: moelocal list --all. To get one all the same: moelocal pull "
                f"{_typed(asked, listing, listing.models[0])}",
            )
        best = choice.best.label
        if best in checked:
            return choice
        checked.add(best)
        model = next(model for model in listing.models if model.label == best)
        candidates[best] = candidate(model, read_remote(listing, model))


def _name(asked: Reference, listing: Listing, model: HubModel) -> str:
    """What to type from now on."""
    if model.label != model.quant:
        return f"{listing.repo}/{model.label}"
    return f"{asked.entry.name if asked.entry and not model.is_cut else listing.repo}:{model.quant}"


def _typed(asked: Reference, listing: Listing, model: HubModel) -> str:
    """The same, as a shell takes it."""
    return shlex.quote(_name(asked, listing, model))


def _document(name: str, paths: tuple[Path, ...], quant: str, choice: Choice | None) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "model": name,
        "path": str(paths[0]),
        "files": [str(path) for path in paths],
        "bytes": sum(path.stat().st_size for path in paths),
        "quant": quant,
        "reason": choice.reason if choice else None,
        "choices": [
            {
                "quant": option.label,
                "bytes": option.n_bytes,
                "fits": option.fits,
                "decode_per_s": _rounded(option.plan.predicted.decode_per_s)
                if option.plan and option.plan.predicted
                else None,
                "why_not": option.why_not or None,
            }
            for option in (choice.options if choice else ())
        ],
    }


def _rounded(per_s: float) -> float:
    return round(per_s, 2)


def _tell(name: str, paths: tuple[Path, ...], quant: str, as_json: bool, choice: Choice | None = None) -> None:
    """The end: where the model is, and how to run it."""
    from moelocal.cli.messages import note

    if as_json:
        print(json.dumps(_document(name, paths, quant, choice), ensure_ascii=False))
        return
    print(paths[0])
    note(f'Run it: moelocal run {shlex.quote(name)} "Who are you?"')


class DownloadView:
    """Progress on stderr: bars on a terminal, else a line now and then."""

    def __init__(self) -> None:
        from moelocal.cli.screen import is_dumb

        self._seen: int | None = None  # bytes that were here at the last update
        self._bars: Any = None
        self._is_live = sys.stderr.isatty() and not is_dumb()
        self._next_line = time.monotonic() + _LINE_S
        self._began = self._last = time.monotonic()  # `_began` moves on while another download is waited for
        self._has_waited = False
        self.n_fetched = 0

    def update(self, progress: Progress) -> None:
        """Shows how far it is."""
        now, before = time.monotonic(), self._seen
        self._seen = progress.n_done
        if progress.waiting:
            if not self._has_waited:
                self._say("Another download of this file is running: waiting for it.")
            self._has_waited = True
            self._began += now - self._last
        elif before is not None:
            self.n_fetched += progress.n_done - before
        self._last = now
        if progress.waiting:
            return
        if self._is_live and progress.n_done < progress.n_bytes:
            if self._bars is None:
                from moelocal.cli.render_pull import Bars

                self._bars = Bars()
            self._bars.update(progress)
        elif not self._is_live and now >= self._next_line:
            from moelocal.units import format_bytes, format_seconds

            self._next_line = now + _LINE_S
            rate = self.n_fetched / self.seconds
            left = f", {format_seconds((progress.n_bytes - progress.n_done) / rate)} left" if rate else ""
            share = f"{format_bytes(progress.n_done)} of {format_bytes(progress.n_bytes)}"
            self._say(f"{share}, {format_bytes(rate)}/s{left}")

    @property
    def seconds(self) -> float:
        """How long it has taken, waiting for others left out."""
        return max(time.monotonic() - self._began, 1e-3)

    def _say(self, text: str) -> None:
        from moelocal.cli.messages import dim

        dim(text)

    def close(self) -> None:
        """Takes the bars off the screen."""
        if self._bars is not None:
            self._bars.close()
